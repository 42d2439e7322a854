"""How many workers to have: pure functions of what is asked, what is there and what can be used."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.recipe.values import parse_workers

IDLE_SECONDS = 30.0
"""A worker that is too many, and idle for so long, is given back. To start another one takes some
seconds; to let it go at once would cost that at every pause."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Workers that are asked for."""

    least: int = 1
    """A run begins when so many are there, and keeps them to its end."""
    most: int | None = None
    """Nothing: as many as the work can use."""
    is_growing: bool = False
    """Whether more are asked for than there is room for, for an autoscaler to make room."""

    @classmethod
    def of(cls, workers: int | str | None) -> "Bounds":
        """What `--workers` means.

        Without it a run takes the room there is, and what comes: nobody's cloud grows unasked. With
        a number it takes just so many, of the room there is; with `MIN..MAX` it grows, and gives
        back what it does not need: only who can ask for more can let go.
        """
        asked = parse_workers(workers)
        return cls() if asked is None else cls(*asked, is_growing=".." in str(workers))

    def for_work(self, most: int) -> "Bounds":
        """The same for work that can never use more than so many."""
        return replace(self, least=min(self.least, most))

    def within(self, max_workers: int) -> int:
        """What the work can use, within the bounds."""
        return max(self.least, max_workers if self.most is None else min(max_workers, self.most))


def wanted(bounds: Bounds, max_workers: int, room: int) -> int:
    """Workers to have.

    Args:
        max_workers: Workers that the work can use.
        room: Workers that there are or are asked for, and those that the nodes have room for.
    """
    within = bounds.within(max_workers)
    return within if bounds.is_growing else min(within, room)


def to_give_back(idle: Mapping[int, float], spare: int) -> list[int]:
    """Those of the spare workers that are idle for long, the longest first.

    Args:
        idle: Seconds for which workers have been idle that hold nothing.
        spare: Workers that are too many.
    """
    long = [worker for worker, seconds in idle.items() if seconds > IDLE_SECONDS]
    return sorted(long, key=lambda worker: (-idle[worker], worker))[: max(0, spare)]
