"""Number of workers: pure functions of the request, the available room and the work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.recipe.values import parse_workers

IDLE_SECONDS = 30.0
"""Idle time after which a surplus worker is given back. A new one takes seconds to start, which an
earlier return would cost at each pause."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Requested number of workers."""

    least: int = 1
    """Minimum: a run begins with so many, and keeps them to its end."""
    most: int | None = None
    """Maximum; None: as many as the work can use."""
    is_growing: bool = False
    """True if workers are requested beyond the available room, for an autoscaler to add nodes."""

    @classmethod
    def of(cls, workers: int | str | None) -> "Bounds":
        """Parse the value of `--workers`.

        Without a value the pool uses available capacity and never requests nodes. With a number it
        takes exactly so many of the available room. Only a `MIN..MAX` pool scales up and returns
        idle workers.
        """
        asked = parse_workers(workers)
        return cls() if asked is None else cls(*asked, is_growing=".." in str(workers))

    def for_work(self, most: int) -> "Bounds":
        """Bounds for work that can use at most `most` workers."""
        return replace(self, least=min(self.least, most))

    def within(self, max_workers: int) -> int:
        """Number of workers within the bounds, for work that can use `max_workers`."""
        return max(self.least, max_workers if self.most is None else min(max_workers, self.most))


def wanted(bounds: Bounds, max_workers: int, room: int) -> int:
    """Number of workers that the pool is to have.

    Args:
        max_workers: Workers that the work can use.
        room: Workers that exist or are requested, plus those that the nodes have room for.
    """
    within = bounds.within(max_workers)
    return within if bounds.is_growing else min(within, room)


def to_give_back(idle: Mapping[int, float], surplus: int) -> list[int]:
    """Surplus workers that have been idle for `IDLE_SECONDS`, the longest idle first.

    Args:
        idle: Idle seconds of the workers that hold no state.
        surplus: Number of surplus workers.
    """
    long = [worker for worker, seconds in idle.items() if seconds > IDLE_SECONDS]
    return sorted(long, key=lambda worker: (-idle[worker], worker))[: max(0, surplus)]
