"""Accumulation of a shard's calibration statistics while chunks pass through it.

Shape suffixes: T tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from transformers.pytorch_utils import Conv1D

from orchestrator.linalg.cosine import Cosine
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram
from orchestrator.linalg.magnitude import Magnitude
from orchestrator.linalg.tensor_cores import tensor_cores
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.residual_cosines import ResidualCosines
from orchestrator.plan.linear import Linear

Side = Literal["input", "output"]
"""Gram that a method requests: of a linear's inputs, or of its outputs without the bias."""


class Calibration:
    """Grams of some linears of a shard, summed over chunks in the order in which they pass.

    Only tokens inside a chunk's mask count. Linears of one site share one input Gram, accumulated
    once. An output Gram is of `W x` in float32 without the bias: of the layer's own output if that
    is the same, else recomputed, because rounding to 16 bits would change the Gram by 2 %.

    Cost per chunk: T n^2 multiply-adds for each Gram of n channels (see `Gram`), and one product
    with the weight for each recomputed output. Close the object to remove its hooks.

    With `curvature`, call `backward` instead of `forward`: it passes a chunk forward and backward
    and also accumulates the gradients with respect to each linear's outputs, as g if O <= I and as
    W^T g if O > I. Cost: one more Gram and, in the second case, one product with the weight.

    Args:
        magnitudes: Also accumulate the mean magnitudes of the inputs.
        curvature: Also accumulate gradients.
        outputs: Accumulate gradients as g even if O > I.
    """

    def __init__(
        self,
        shard: Shard,
        linears: Sequence[Linear],
        side: Callable[[Linear, Sequence[Linear]], Side],
        *,
        magnitudes: bool = False,
        curvature: bool = False,
        outputs: bool = False,
    ) -> None:
        blocks = {linear.block for linear in linears}
        self._shard = shard
        self._grams: dict[str, Gram] = {}
        self._magnitudes: dict[str, Magnitude] = {}
        self._curvatures: dict[str, Gram] = {}
        self._sources: dict[str, tuple[str, Side]] = {}
        self._hooks: list[Any] = []
        self._places_N: Tensor | None = None
        self._residual_cosines = ResidualCosines(
            shard, [linear for linear in shard.linears if linear.block in blocks], self._select
        )
        for linear in linears:
            together = [each for each in linears if each.site == linear.site]
            self._request(linear, side(linear, together))
            if magnitudes and linear.site not in self._magnitudes:
                self._request_magnitude(linear)
            if curvature:
                self._request_curvature(linear, outputs)

    def _request(self, linear: Linear, side: Side) -> None:
        source = linear.site if side == "input" else f"{linear.name} output"
        self._sources[linear.name] = source, side
        if source in self._grams:
            return
        module = self._shard.module(linear.name)
        size = linear.in_features if side == "input" else linear.out_features
        gram = self._grams[source] = Gram(size, dense_weight(module).device)

        def gather_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            gram.update(self._select(inputs[0]))

        def gather_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.bias is None and output.dtype.itemsize >= 4:
                gram.update(self._select(output))
            else:
                rows_TI, weight_OI = self._select(inputs[0]), dense_weight(module)
                with tensor_cores(rows_TI.dtype, weight_OI.dtype):
                    rows_TO = apply_linear(rows_TI.float(), weight_OI.float())
                gram.update(rows_TO)

        self._hooks.append(
            module.register_forward_pre_hook(gather_input)
            if side == "input"
            else module.register_forward_hook(gather_output)
        )

    def _request_magnitude(self, linear: Linear) -> None:
        module = self._shard.module(linear.name)
        magnitude = Magnitude(linear.in_features, dense_weight(module).device)
        self._magnitudes[linear.site] = magnitude

        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            magnitude.update(self._select(inputs[0]))

        self._hooks.append(module.register_forward_pre_hook(gather))

    def _request_curvature(self, linear: Linear, outputs: bool) -> None:
        module = self._shard.module(linear.name)
        as_is = outputs or linear.out_features <= linear.in_features
        size = linear.out_features if as_is else linear.in_features
        gram = self._curvatures[linear.name] = Gram(size, dense_weight(module).device)

        def gather(grad_BTO: Tensor) -> None:
            rows_TO = self._select(grad_BTO)
            if as_is:
                gram.update(rows_TO)
            else:
                weight_OI = dense_weight(module)
                with tensor_cores(rows_TO.dtype, weight_OI.dtype):
                    rows_TI = rows_TO.float() @ weight_OI.float()
                gram.update(rows_TI)

        def monitor(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # the model's first linears have no predecessor that requires a gradient
            output.requires_grad_().register_hook(gather)  # type: ignore[no-untyped-call]

        self._hooks.append(module.register_forward_hook(monitor))

    def _select(self, states_BTI: Tensor) -> Tensor:
        return rows_at(states_BTI.detach(), self._places_N)

    def forward(self, chunk: Chunk) -> Chunk:
        """Pass one chunk through the shard and add it to the statistics."""
        self._set_mask(chunk)
        return self._shard.forward(chunk)

    def backward(
        self, chunk: Chunk, grads: Sequence[Tensor | None] | Callable[[Tensor], Tensor]
    ) -> list[Tensor | None]:
        """Pass one chunk forward and backward, as `Shard.backward`; adds to all statistics."""
        self._set_mask(chunk)
        return self._shard.backward(chunk, grads)

    def _set_mask(self, chunk: Chunk) -> None:
        # once per chunk: all hooks select with the same indices
        self._places_N = chunk.places(self._shard.device)

    def flush_writes(self) -> None:
        """End the accumulation: later chunks are ignored, and each Gram takes 8 n^2 bytes.

        Removes the hooks, which hold references to the Grams; `forget` frees memory only then.
        """
        self._residual_cosines.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for gram in (*self._grams.values(), *self._curvatures.values()):
            gram.flush_writes()

    def statistic(self, linear: Linear) -> InputGram | OutputGram:
        """Return the accumulated statistics of one linear."""
        source, side = self._sources[linear.name]
        gram, magnitude = self._grams[source], self._magnitudes.get(linear.site)
        curvature = self._curvatures.get(linear.name)
        kind = InputGram if side == "input" else OutputGram
        return kind(
            gram.matrix(),
            gram.tokens,
            magnitude.mean() if magnitude else None,
            Curvature(curvature.matrix(), curvature.tokens) if curvature else None,
        )

    def cosines(self, block: int) -> dict[str, Cosine]:
        """Return the residual-stream cosines of a block's sublayers, by the sublayer's name."""
        found = self._residual_cosines.cosines.items()
        return {name: cosine for name, cosine in found if name.startswith(f"{block}.")}

    def forget(self, linears: Sequence[Linear]) -> None:
        """Free the Grams used only by these linears; call after `flush_writes`."""
        for linear in linears:
            self._sources.pop(linear.name, None)
            self._curvatures.pop(linear.name, None)
        used = {source for source, _ in self._sources.values()}
        self._grams = {source: gram for source, gram in self._grams.items() if source in used}

    def close(self) -> None:
        self.flush_writes()
        self._sources = {}
        self._grams, self._magnitudes, self._curvatures = {}, {}, {}


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of an `nn.Linear` or `Conv1D` as [outputs, inputs]; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_dense(module, weight.detach())


def as_dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Transpose a weight stored for this module to [outputs, inputs] if necessary; a view."""
    return weight.T if isinstance(module, Conv1D) else weight
