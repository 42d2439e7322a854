"""Memory of one worker, and what fits into it."""

from dataclasses import dataclass

from orchestrator.forecast import memory
from orchestrator.forecast.memory import Footprint

MOST_BLOCKS = 2
"""Blocks of a shard at most, unless the recipe names a number of shards."""
USABLE = 0.92
"""Usable fraction of a host's memory: the rest is the system's, and lost to fragmentation. All of a
GPU's is usable: the memory of CUDA and its allocator is in the footprint (`memory.on_gpu`)."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a GPU, or of a host that has none."""

    bytes: float | None
    """None if unknown; then everything fits."""
    is_gpu: bool

    @property
    def usable(self) -> float:
        """Bytes that a footprint may take."""
        return float("inf") if self.bytes is None else self._share * self.bytes

    @property
    def _share(self) -> float:
        return 1.0 if self.is_gpu else USABLE

    def taken(self, found: Footprint) -> Footprint:
        """The part of a footprint in this memory."""
        return memory.on_gpu(found) if self.is_gpu else found

    def fits(self, found: Footprint) -> bool:
        return self.taken(found).total <= self.usable

    def needed(self, found: Footprint) -> float:
        """Bytes of memory with which the footprint would fit."""
        return self.taken(found).total / self._share
