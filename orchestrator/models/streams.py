"""How much each sublayer turns the residual stream, gathered while chunks pass a shard.

Shape suffixes: T tokens, C channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from orchestrator.linalg.cosine import Cosine
from orchestrator.models.chunk import Chunk
from orchestrator.models.shard import Shard
from orchestrator.plan import Linear


class Streams:
    """Cosines between the residual stream before and after each sublayer of a shard's blocks.

    The stream before a sublayer is what enters the norm that its first linear reads from; the
    stream after it is what enters the next norm, or leaves the shard. Sublayers that read the same
    stream (in parallel, as in GPT-NeoX) have the same stream after them, too. A sublayer without
    such a norm has no cosine.
    """

    def __init__(self, shard: Shard, linears: Sequence[Linear]) -> None:
        self.cosines: dict[str, Cosine] = {}
        """By the sublayer's name."""
        self._norms: dict[str, str] = {}
        self._entered: list[tuple[str, Tensor]] = []
        for linear in linears:
            if linear.norm:
                self._norms.setdefault(linear.sublayer, linear.norm)
                self.cosines.setdefault(linear.sublayer, Cosine())
        self._hooks = [
            shard.module(norm).register_forward_pre_hook(partial(self._note, norm))
            for norm in dict.fromkeys(self._norms.values())
        ]

    def _note(self, norm: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._entered.append((norm, inputs[0]))

    def add(self, passed: Chunk, select: Callable[[Tensor], Tensor]) -> None:
        """Adds the chunk that has just passed the shard; `select` gives its real tokens' rows."""
        assert passed.payload is not None
        streams = [*(tensor for _, tensor in self._entered), passed.payload.tensors()[0]]
        following = {
            norm: next(later for later in streams[index + 1 :] if not _same(later, stream))
            for index, (norm, stream) in enumerate(self._entered)
        }
        before = dict(self._entered)
        self._entered = []
        for sublayer, norm in self._norms.items():
            rows_TC = select(before[norm])
            self.cosines[sublayer].update(rows_TC, select(following[norm]))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._entered = [], []


def _same(one: Any, other: Any) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
