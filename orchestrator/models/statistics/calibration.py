"""Accumulation of a shard's calibration statistics while chunks pass through it.

Shape suffixes: T tokens, O outputs, I inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear

from orchestrator.linalg.activation import Activation
from orchestrator.linalg.cosine import Cosine
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import Curvature, InputGram, OutputGram, Statistic
from orchestrator.linalg.sparsity.magnitude import Magnitude
from orchestrator.linalg.tensor_cores import tensor_cores
from orchestrator.models.experts.module import Experts, RoutedRows
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.expert_rows import ExpertRows, GramOfRows, empty_rows
from orchestrator.models.statistics.gradients import PairedGradients, PairedKind, on_gradient
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.statistics.residual_cosines import ResidualCosines
from orchestrator.models.statistics.routed import (
    ChunkRows,
    Pools,
    PoolSum,
    RunningMoment,
    experts_of,
    pool_of,
    rows_of,
)
from orchestrator.plan.experts import expert_name, module_of_experts, reads_tokens
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
    then scaled to n + 1, so that an allocation gives it values by its use. Statistics of a linear
    in a vision tower are of all patches of the images.

    Args:
        magnitudes: Also accumulate the mean magnitudes of the inputs.
        curvature: Also accumulate gradients.
        outputs: Function of a linear: True to accumulate its gradients as g even if O > I.
        gradient: Also accumulate gradients by weights or their directions, by `backward` too.
        block_cosines: Also compute the cosine of the residual stream before and after each block.
        weighted: Weight the rows of experts as described; False: they count alike.
        tokens: Tokens of all chunks, if known. Inputs of experts are then kept as rows where that
            takes less memory (`plan.experts`). Chunks that pass again must have the same index
            and the same values.
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
        gradient: PairedKind | None = None,
        block_cosines: bool = False,
        weighted: bool = True,
        tokens: int | None = None,
    ) -> None:
        self._shard = shard
        self._grams: dict[str, Gram | GramOfRows] = {}
        self._magnitudes: dict[str, Magnitude] = {}
        self._curvatures: dict[str, Gram] = {}
        self._activations: dict[str, Activation] = {}
        self._sources: dict[str, tuple[str, Side]] = {}
        self._hooks: list[Any] = []
        self._rows = ChunkRows(shard, is_weighted=weighted and not (curvature or gradient))
        self._experts = {linear.name: experts_of(shard, linear) for linear in linears}
        self._gradients = PairedGradients(shard, self._rows, self._experts)
        self._gram_pools, self._magnitude_pools, self._curvature_pools = Pools(), Pools(), Pools()
        self._residual_cosines = ResidualCosines(
            *(shard, {linear.block for linear in linears}, self._rows.select),
            of_blocks=block_cosines,
        )
        sites: dict[str, list[Linear]] = {}
        for linear in linears:
            sites.setdefault(linear.site, []).append(linear)
        sides = {linear.name: side(linear, sites[linear.site]) for linear in linears}
        grams = {
            linear: _gram_of(linear, sides[linear.name])
            for linear in linears
            if self._experts[linear.name] is not None
        }
        itemsize = min((dense_weight(shard.module(x.name)).itemsize for x in grams), default=0)
        self.expert_rows = empty_rows(self._rows, grams, tokens=tokens, itemsize=itemsize)
        """Inputs that are kept in place of Grams, by the module of their experts."""
        for linear in linears:
            self._request(linear, sides[linear.name])
            if magnitudes and linear.site not in self._magnitudes:
                self._request_magnitude(linear)
            if curvature:
                self._request_curvature(linear, as_is=outputs(linear))
            if gradient:
                self._hooks.append(self._gradients.request(linear, gradient))

    def _request(self, linear: Linear, side: Side) -> None:
        source, size = _gram_of(linear, side)
        self._sources[linear.name] = source, side
        if source in self._grams:
            return
        module = self._shard.module(linear.name)
        experts = self._experts[linear.name]
        if experts is not None:
            self._gram_pools.add(source, pool_of(linear, side))
        if experts is not None and reads_tokens(linear):
            rows = self.expert_rows.get(module_of_experts(linear))
            if rows is not None:
                self._keep_rows(linear, experts, rows)
                return
        gram = self._grams[source] = Gram(size, dense_weight(module).device)

        def gather_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            gram.update(self._select(linear, inputs[0], rows_of(experts), weighted=True))

        def gather_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._add_output(gram, linear, inputs[0], rows_of(experts), output=output)

        self._hooks.append(
            module.register_forward_pre_hook(gather_input)
            if side == "input"
            else module.register_forward_hook(gather_output)
        )

    def _select(
        self, linear: Linear, states: Tensor, routed: RoutedRows | None, *, weighted: bool = False
    ) -> Tensor:
        """Select the rows that count for a linear: all patches of images in a vision tower."""
        if linear.tower:
            return rows_at(states.detach(), None)
        return self._rows.select(states, routed, weighted=weighted)

    def _keep_rows(self, linear: Linear, experts: Experts, rows: ExpertRows) -> None:
        """Keep the rows of an expert, and gather their Gram when it is needed."""
        module, expert = self._shard.module(linear.name), expert_name(linear)
        source, side = self._sources[linear.name]
        size = linear.in_features if side == "input" else linear.out_features
        empty = partial(Gram, size, dense_weight(module).device)

        def gather(gram: Gram, states_NH: Tensor, routed: RoutedRows) -> None:
            if side == "input":
                gram.update(self._rows.select(states_NH, routed, weighted=True))
            else:
                self._add_output(gram, linear, states_NH, routed)

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            routed = rows_of(experts)
            assert routed is not None
            rows.keep(expert, inputs[0], routed)

        self._grams[source] = GramOfRows(empty, size, rows=rows, expert=expert, gather=gather)
        self._hooks.append(module.register_forward_pre_hook(keep))

    def _add_output(
        self,
        gram: Gram,
        linear: Linear,
        states: Tensor,
        routed: RoutedRows | None,
        *,
        output: Tensor | None = None,
    ) -> None:
        """Add `W x` of the rows of the current chunk, in float32 and without the bias.

        Args:
            states: Inputs of the linear.
            output: Its output, if it was computed.
        """
        module = self._shard.module(linear.name)
        weight_OI = dense_weight(module)
        if module.bias is None and (states if output is None else output).dtype.itemsize >= 4:
            output = apply_linear(states, weight_OI) if output is None else output
            gram.update(self._select(linear, output, routed, weighted=True))
            return
        rows_TI = self._select(linear, states, routed, weighted=True)
        with tensor_cores(rows_TI.dtype, weight_OI.dtype):
            rows_TO = apply_linear(rows_TI.float(), weight_OI.float())
        gram.update(rows_TO)

    def _request_magnitude(self, linear: Linear) -> None:
        module = self._shard.module(linear.name)
        magnitude = Magnitude(linear.in_features, dense_weight(module).device)
        self._magnitudes[linear.site] = magnitude
        experts = self._experts[linear.name]
        if experts is not None:
            self._magnitude_pools.add(linear.site, pool_of(linear, "input"))

        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            magnitude.update(self._select(linear, inputs[0], rows_of(experts)))

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

        self._hooks.append(on_gradient(module, experts, lambda _: gather))

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

    def flush_writes(self, *, pools: bool = True) -> None:
        """End the accumulation: later chunks are ignored, and each Gram takes 8 n^2 bytes.

        Removes the hooks, which hold references to the Grams; `forget` frees memory only then.

        Args:
            pools: Sum over the experts of a block for rare ones; False: `pool` does it.
        """
        self._remove_hooks()
        for gram in (*self._grams.values(), *self._curvatures.values()):
            gram.flush_writes()
        self._gradients.settle()
        for kept, statistics in self._pooled().values() if pools else ():
            kept.settle(statistics)

    def _remove_hooks(self) -> None:
        self._residual_cosines.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.expert_rows = [], {}

    def _pooled(self) -> dict[str, tuple[Pools, Mapping[str, RunningMoment | Magnitude]]]:
        """Return the pools of every kind of statistics, and the statistics."""
        return {
            "gram": (self._gram_pools, self._grams),
            "magnitude": (self._magnitude_pools, self._magnitudes),
            "curvature": (self._curvature_pools, self._curvatures),
        }

    def pool(self, linears: Sequence[Linear], earlier: Mapping[str, PoolSum]) -> dict[str, PoolSum]:
        """Add one of several groups of experts of a block to the sums over those before it.

        Args:
            linears: Linears of this group.
            earlier: Result of this method for the group before; empty for the first.

        Returns:
            The sums, by kind of statistics and pool.
        """
        found: dict[str, PoolSum] = {}
        for kind, (pools, statistics) in self._pooled().items():
            start = f"{kind} "
            names = [self._named(linear)[kind] for linear in linears]
            before = {
                name.removeprefix(start): each
                for name, each in earlier.items()
                if name.startswith(start)
            }
            sums = pools.extend(names, statistics, before)
            found |= {f"{start}{name}": each for name, each in sums.items()}
        return found

    def _named(self, linear: Linear) -> dict[str, str]:
        """Return the names of a linear's statistics by kind; it may lack some."""
        source, _ = self._sources[linear.name]
        return {"gram": source, "magnitude": linear.site, "curvature": linear.name}

    def is_rare(self, linear: Linear) -> bool:
        """Return True if a statistic of the linear needs the sums over all experts of its block."""
        names = self._named(linear)
        return any(
            pools.is_short(names[kind], statistics)
            for kind, (pools, statistics) in self._pooled().items()
        )

    def sums(self, linear: Linear) -> dict[str, PoolSum]:
        """Return the sums of a linear without mean tokens, and their tokens, for `restore`."""
        source, side = self._sources[linear.name]
        gram = self._grams[source]
        found: dict[str, PoolSum] = {side: (gram.matrix(), gram.tokens)}
        if (magnitude := self._magnitudes.get(linear.site)) is not None:
            found["magnitude"] = magnitude.sum(), magnitude.tokens
        if (curvature := self._curvatures.get(linear.name)) is not None:
            found["curvature"] = curvature.matrix(), curvature.tokens
        return found

    def restore(self, linear: Linear, sums: Mapping[str, PoolSum]) -> None:
        """Take over the sums of an expert's linear from another pass, after `flush_writes`."""
        side: Side = "input" if "input" in sums else "output"
        source, _ = _gram_of(linear, side)
        self._sources[linear.name] = source, side
        self._grams[source] = Gram.of(*sums[side])
        self._gram_pools.add(source, pool_of(linear, side))
        if "magnitude" in sums:
            self._magnitudes[linear.site] = Magnitude.of(*sums["magnitude"])
            self._magnitude_pools.add(linear.site, pool_of(linear, "input"))
        if "curvature" in sums:
            self._curvatures[linear.name] = Gram.of(*sums["curvature"])
            self._curvature_pools.add(linear.name, pool_of(linear, "output"))

    def statistic(self, linear: Linear) -> Statistic:
        """Return the accumulated statistics of one linear."""
        source, side = self._sources[linear.name]
        gram = self._grams[source]
        if isinstance(gram, GramOfRows):
            # gate and up may share it; `forget` frees it after the last of them
            self._grams[source] = gram.made()
        moment, _, most = self._gram_pools.moment(source, self._grams)
        moment *= self._gram_pools.use(source, self._grams)
        magnitude_I = curvature = None
        if linear.site in self._magnitudes:
            magnitude_I = self._magnitude_pools.mean(linear.site, self._magnitudes)
        if linear.name in self._curvatures:
            matrix_KK, rows, _ = self._curvature_pools.moment(linear.name, self._curvatures)
            curvature = Curvature(matrix_KK, rows)
        kind = InputGram if side == "input" else OutputGram
        return kind(moment, most, magnitude_I, curvature, self._gradients.of(linear))

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
        """Return the cosines of the residual stream of a block, `3`, and its sublayers, `3.mlp`."""
        found = self._residual_cosines.cosines.items()
        return {name: each for name, each in found if name.partition(".")[0] == f"{block}"}

    def forget(self, linears: Sequence[Linear]) -> None:
        """Free the Grams used only by these linears; call after `flush_writes`."""
        for linear in linears:
            self._sources.pop(linear.name, None)
            self._curvatures.pop(linear.name, None)
            self._gradients.forget(linear)
        used = {source for source, _ in self._sources.values()}
        self._grams = {source: gram for source, gram in self._grams.items() if source in used}

    def close(self) -> None:
        self._remove_hooks()
        self._sources = {}
        self._grams, self._magnitudes, self._curvatures = {}, {}, {}
        self._gram_pools, self._magnitude_pools, self._curvature_pools = Pools(), Pools(), Pools()
        self._gradients = PairedGradients(self._shard, self._rows, self._experts)


def _gram_of(linear: Linear, side: Side) -> tuple[str, int]:
    """Return the source of a linear's Gram, and its number of channels."""
    if side == "input":
        return linear.site, linear.in_features
    return f"{linear.name} output", linear.out_features
