"""Accumulation of a shard's calibration statistics while chunks pass through it.

Shape suffixes: T tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from transformers.pytorch_utils import Conv1D

from orchestrator.linalg.activation import Activation
from orchestrator.linalg.cosine import Cosine
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, Statistic
from orchestrator.linalg.magnitude import Magnitude
from orchestrator.linalg.tensor_cores import tensor_cores
from orchestrator.models.experts.module import RoutedRows
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.residual_cosines import ResidualCosines
from orchestrator.models.statistics.routed import (
    ChunkRows,
    Pools,
    expert_name,
    experts_of,
    pool_of,
    rows_of,
)
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

    Statistics of an expert are of the rows that are routed to it. Without `curvature` its Grams are
    of rows times the router's weights, by which the expert's error reaches the residual stream;
    gradients contain these weights. An expert with fewer tokens than channels gets
    `POOLED_TOKENS` tokens of the mean over the block's experts in addition; its Gram of n tokens is
    then scaled to n + 1, so that an allocation gives it what its use is worth. Statistics of a
    linear in a vision tower are of all patches of the images.

    Args:
        magnitudes: Also accumulate the mean magnitudes of the inputs.
        curvature: Also accumulate gradients.
        outputs: Function of a linear: True to accumulate its gradients as g even if O > I.
        weighted: Weight the rows of experts as described; False: they count alike.
    """

    def __init__(
        self,
        shard: Shard,
        linears: Sequence[Linear],
        side: Callable[[Linear, Sequence[Linear]], Side],
        *,
        magnitudes: bool = False,
        curvature: bool = False,
        outputs: Callable[[Linear], bool] = lambda _: False,
        weighted: bool = True,
    ) -> None:
        blocks = {linear.block for linear in linears}
        self._shard = shard
        self._grams: dict[str, Gram] = {}
        self._magnitudes: dict[str, Magnitude] = {}
        self._curvatures: dict[str, Gram] = {}
        self._activations: dict[str, Activation] = {}
        self._sources: dict[str, tuple[str, Side]] = {}
        self._hooks: list[Any] = []
        self._rows = ChunkRows(shard, is_weighted=weighted and not curvature)
        self._experts = {linear.name: experts_of(shard, linear) for linear in linears}
        self._gram_pools, self._magnitude_pools, self._curvature_pools = Pools(), Pools(), Pools()
        self._residual_cosines = ResidualCosines(
            shard, [linear for linear in shard.linears if linear.block in blocks], self._rows.select
        )
        sites: dict[str, list[Linear]] = {}
        for linear in linears:
            sites.setdefault(linear.site, []).append(linear)
        for linear in linears:
            self._request(linear, side(linear, sites[linear.site]))
            if magnitudes and linear.site not in self._magnitudes:
                self._request_magnitude(linear)
            if curvature:
                self._request_curvature(linear, as_is=outputs(linear))

    def _request(self, linear: Linear, side: Side) -> None:
        source = linear.site if side == "input" else f"{linear.name} output"
        self._sources[linear.name] = source, side
        if source in self._grams:
            return
        module = self._shard.module(linear.name)
        size = linear.in_features if side == "input" else linear.out_features
        gram = self._grams[source] = Gram(size, dense_weight(module).device)
        experts = self._experts[linear.name]
        if experts is not None:
            self._gram_pools.add(source, pool_of(linear, side))

        def gather_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            gram.update(select(inputs[0]))

        def select(states: Tensor) -> Tensor:
            return self._select(linear, states, weighted=True)

        def gather_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.bias is None and output.dtype.itemsize >= 4:
                gram.update(select(output))
            else:
                rows_TI, weight_OI = select(inputs[0]), dense_weight(module)
                with tensor_cores(rows_TI.dtype, weight_OI.dtype):
                    rows_TO = apply_linear(rows_TI.float(), weight_OI.float())
                gram.update(rows_TO)

        self._hooks.append(
            module.register_forward_pre_hook(gather_input)
            if side == "input"
            else module.register_forward_hook(gather_output)
        )

    def _select(self, linear: Linear, states: Tensor, *, weighted: bool = False) -> Tensor:
        """Select the rows that count for a linear: all patches of images in a vision tower."""
        if linear.tower:
            return rows_at(states.detach(), None)
        routed = rows_of(self._experts[linear.name])
        return self._rows.select(states, routed, weighted=weighted)

    def _request_magnitude(self, linear: Linear) -> None:
        module = self._shard.module(linear.name)
        magnitude = Magnitude(linear.in_features, dense_weight(module).device)
        self._magnitudes[linear.site] = magnitude
        experts = self._experts[linear.name]
        if experts is not None:
            self._magnitude_pools.add(linear.site, pool_of(linear, "input"))

        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            magnitude.update(self._select(linear, inputs[0]))

        self._hooks.append(module.register_forward_pre_hook(gather))

    def _request_curvature(self, linear: Linear, *, as_is: bool) -> None:
        module = self._shard.module(linear.name)
        as_is = as_is or linear.out_features <= linear.in_features
        size = linear.out_features if as_is else linear.in_features
        gram = self._curvatures[linear.name] = Gram(size, dense_weight(module).device)
        experts = self._experts[linear.name]
        if experts is not None:
            self._curvature_pools.add(linear.name, pool_of(linear, "output"))

        def gather(grad_BTO: Tensor, routed: RoutedRows | None) -> None:
            rows_TO = self._rows.select(grad_BTO, routed)
            if as_is:
                gram.update(rows_TO)
            else:
                weight_OI = dense_weight(module)
                with tensor_cores(rows_TO.dtype, weight_OI.dtype):
                    rows_TI = rows_TO.float() @ weight_OI.float()
                gram.update(rows_TI)

        def monitor(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # the model's first linears have no predecessor that requires a gradient
            # the rows of an expert are known during its forward pass alone
            hook = partial(gather, routed=rows_of(experts))
            output.requires_grad_().register_hook(hook)  # type: ignore[no-untyped-call]

        self._hooks.append(module.register_forward_hook(monitor))

    def forward(self, chunk: Chunk) -> Chunk:
        """Pass one chunk through the shard and add it to the statistics."""
        self._rows.start(chunk)
        return self._shard.forward(chunk)

    def backward(
        self, chunk: Chunk, grads: Sequence[Tensor | None] | Callable[[Tensor], Tensor]
    ) -> list[Tensor | None]:
        """Pass one chunk forward and backward, as `Shard.backward`; adds to all statistics."""
        self._rows.start(chunk)
        return self._shard.backward(chunk, grads)

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
        self._gram_pools.settle(self._grams)
        self._magnitude_pools.settle(self._magnitudes)
        self._curvature_pools.settle(self._curvatures)

    def statistic(self, linear: Linear) -> Statistic:
        """Return the accumulated statistics of one linear."""
        source, side = self._sources[linear.name]
        moment, _, most = self._gram_pools.moment(source, self._grams)
        moment *= self._gram_pools.use(source, self._grams)
        magnitude_I = curvature = None
        if linear.site in self._magnitudes:
            magnitude_I = self._magnitude_pools.mean(linear.site, self._magnitudes)
        if linear.name in self._curvatures:
            matrix_KK, rows, _ = self._curvature_pools.moment(linear.name, self._curvatures)
            curvature = Curvature(matrix_KK, rows)
        kind = InputGram if side == "input" else OutputGram
        return kind(moment, most, magnitude_I, curvature)

    def expert_tokens(self, linears: Sequence[Linear]) -> dict[str, int]:
        """Return the number of tokens of the experts of linears, by the name of their module.

        Call it before `forget`. A chunk that passes several times counts for each.
        """
        return {
            expert_name(linear): self._grams[self._sources[linear.name][0]].tokens
            for linear in linears
            if self._experts[linear.name] is not None
        }

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
        self._gram_pools, self._magnitude_pools, self._curvature_pools = Pools(), Pools(), Pools()


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of an `nn.Linear` or `Conv1D` as [outputs, inputs]; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_dense(module, weight.detach())


def as_dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Transpose a weight stored for this module to [outputs, inputs] if necessary; a view."""
    return weight.T if isinstance(module, Conv1D) else weight
