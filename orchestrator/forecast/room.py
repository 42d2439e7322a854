"""Memory of one worker, and what fits into it."""

from dataclasses import dataclass

from orchestrator.forecast import memory
from orchestrator.forecast.memory import Footprint

USABLE = 0.92
"""Of a host's memory: the rest is the system's, and what an allocator leaves unused. Of a GPU's all
is usable: what CUDA and its allocator take is in the footprint (`memory.on_gpu`)."""


@dataclass(frozen=True, slots=True)
class Room:
    """That of a GPU, or of a host that has none."""

    bytes: float | None
    """None where it is not known; then everything fits."""
    is_gpu: bool

    @property
    def usable(self) -> float:
        """What a footprint may take."""
        return float("inf") if self.bytes is None else self._share * self.bytes

    @property
    def _share(self) -> float:
        return 1.0 if self.is_gpu else USABLE

    def taken(self, found: Footprint) -> Footprint:
        """What a stage takes here."""
        return memory.on_gpu(found) if self.is_gpu else found

    def fits(self, found: Footprint) -> bool:
        return self.taken(found).total <= self.usable

    def needed(self, found: Footprint) -> float:
        """Bytes of memory with which it would fit."""
        return self.taken(found).total / self._share
