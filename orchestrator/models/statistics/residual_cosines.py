"""Cosines of the residual stream before and after each sublayer, accumulated over chunks.

Shape suffixes: B sequences, T tokens, C channels.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from orchestrator.linalg.cosine import Cosine
from orchestrator.models.shards.shard import Shard
from orchestrator.plan.linear import Linear


class ResidualCosines:
    """Cosines between the residual stream before and after each sublayer of a shard's blocks.

    The stream before a sublayer is the input of the norm that its first linear reads from; the
    stream after it is the input of the next norm, or the output of the shard. Sublayers that read
    the same stream (in parallel, as in GPT-NeoX) also share the stream after them. A sublayer
    without such a norm has no cosine.

    Each cosine is computed as soon as the stream after the sublayer is available: both tensors are
    then still in the processor's caches, and none is kept longer than one sublayer.

    Args:
        select: Selects the rows of a state [B, T, C] that belong to real tokens.
    """

    def __init__(
        self, shard: Shard, linears: Sequence[Linear], select: Callable[[Tensor], Tensor]
    ) -> None:
        self.cosines: dict[str, Cosine] = {}
        """Cosines by sublayer name."""
        self._shard = shard
        self._select = select
        self._sublayers: dict[str, list[str]] = {}
        self._stream: Tensor | None = None
        self._active: list[str] = []
        for linear in linears:
            if linear.norm and linear.sublayer not in self.cosines:
                self._sublayers.setdefault(linear.norm, []).append(linear.sublayer)
                self.cosines[linear.sublayer] = Cosine()
        self._hooks = [
            shard.module(norm).register_forward_pre_hook(partial(self._begin, norm))
            for norm in self._sublayers
        ]
        shard.on_output = self._end

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
        self._hooks, self._stream = [], None


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
