"""Cosines of the residual stream before and after each sublayer and block, summed over chunks.

Shape suffixes: B sequences, T tokens, C channels.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor, nn

from orchestrator.linalg.cosine import Cosine
from orchestrator.models.shards.chunk import BlockState
from orchestrator.models.shards.shard import Shard

UNDEFINED = 0.5
"""Cosine of a block's input and output where one of them is zero or overflows, as in GRASP's code
(arXiv 2501.00339)."""


class ResidualCosines:
    """Cosines between the residual stream before and after each sublayer of a shard's blocks.

    The stream before a sublayer is the input of the norm that its first linear reads from; the
    stream after it is the input of the next norm, or the output of the shard. Sublayers that read
    the same stream (in parallel, as in GPT-NeoX) also share the stream after them. A sublayer
    without such a norm has no cosine.

    Those of a block are between its input and its output; an undefined one counts as
    `UNDEFINED`. A block whose state has another shape at its end has none.

    Each cosine is computed as soon as the stream after the sublayer is available: both tensors are
    then still in the processor's caches, and none is kept longer than one sublayer.

    Args:
        blocks: Blocks of the sublayers.
        select: Selects the rows of a state [B, T, C] that belong to real tokens.
        of_blocks: Also compute the cosine of every block.
    """

    def __init__(
        self,
        shard: Shard,
        blocks: Collection[int],
        select: Callable[[Tensor], Tensor],
        *,
        of_blocks: bool = False,
    ) -> None:
        linears = [linear for linear in shard.linears if linear.block in blocks]
        self.cosines: dict[str, Cosine] = {}
        """Cosines by sublayer name, `3.mlp`, and of a block by its number, `3`."""
        self._shard = shard
        self._select = select
        self._sublayers: dict[str, list[str]] = {}
        self._stream: Tensor | None = None
        self._active: list[str] = []
        for linear in linears:
            if linear.norm and linear.sublayer not in self.cosines:
                self._sublayers.setdefault(linear.norm, []).append(linear.sublayer)
                self.cosines[linear.sublayer] = Cosine()
        self._entered: tuple[str, Tensor] | None = None
        self._hooks = [
            shard.module(norm).register_forward_pre_hook(partial(self._begin, norm))
            for norm in self._sublayers
        ]
        modules = {linear.name.removesuffix(f".{linear.role}"): linear.block for linear in linears}
        for name, block in modules.items() if of_blocks else ():
            module, enter = shard.module(name), partial(self._enter, f"{block}")
            self._hooks += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(self._leave),
            ]
        shard.on_output = self._end_of_shard

    def _enter(
        self, block: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self._entered = block, given[0] if given else named["hidden_states"]

    def _leave(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._end_block(BlockState(output).tensors()[0])

    def _end_of_shard(self, stream: Tensor) -> None:
        self._end(stream)
        self._end_block(stream)

    def _end_block(self, after: Tensor) -> None:
        """End the block that was entered, once: the shard's last one may tell of its end twice."""
        if self._entered is None:
            return
        (block, before), self._entered = self._entered, None
        if before.shape == after.shape:
            cosine = self.cosines.setdefault(block, Cosine(undefined=UNDEFINED))
            cosine.update(self._select(before), self._select(after))

    def _begin(self, norm: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._end(inputs[0])
        self._stream = inputs[0]
        self._active += self._sublayers[norm]

    def _end(self, stream: Tensor) -> None:
        """End the active sublayers unless `stream` is the one that they began with."""
        if self._stream is None or _same(self._stream, stream):
            return
        before_TC, after_TC = self._select(self._stream), self._select(stream)
        for sublayer in self._active:
            self.cosines[sublayer].update(before_TC, after_TC)
        self._stream, self._active = None, []

    def close(self) -> None:
        self._shard.on_output = None
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._stream, self._entered = [], None, None


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
