"""Count of the calls of a dispatch, and of the stage that it belongs to."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.progress.eta import FRESH, Measured, Moment, Running


@dataclass(frozen=True, slots=True)
class Counted:
    """Progress in a unit that users know."""

    done: int
    total: int
    of: str
    """Plural noun: `chunks`, `blocks`, `files`."""


class Labelled(Protocol):
    """A call, as far as it is counted."""

    @property
    def worker(self) -> int: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Work of later passes of a stage, which their schedules do not know yet."""

    to_do: Mapping[str, float] = field(default_factory=dict)
    """Units by kind."""
    count: int = 0
    """Number in the unit that users know."""


class Tally:
    """Calls of one dispatch; written by its loop, read by another thread.

    Each attribute is replaced as a whole, so that a reader sees a state that existed.
    """

    def __init__(self, ahead: Ahead, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.ahead = clock, ahead
        self.to_do: Mapping[str, float] = {}
        self.counted: Counted | None = None
        self.ended: Mapping[str, Measured] = {}
        self.running: Mapping[int, tuple[str, float, float, str]] = {}
        self.workers, self._existed, self._looked = 0, 0.0, clock()
        self._started = clock()
        self._last: dict[str, float] = {}
        self._warm: set[tuple[str, int]] = set()

    def look(
        self, to_do: Mapping[str, float], counted: Counted, *, present: int, useful: int
    ) -> None:
        """Record the work that is left.

        Args:
            present: Workers that exist.
            useful: Workers that can be busy.
        """
        now = self._clock()
        self._existed += (now - self._looked) * self.workers
        self._looked, self.workers = now, min(present, useful)
        self.to_do, self.counted = dict(to_do), counted

    def begun(self, call: Labelled, kind: str, units: float) -> None:
        """Record the start of a call."""
        entry = (kind, units, self._clock(), call.label)
        self.running = {**self.running, call.worker: entry}

    def over(self, call: Labelled, *, succeeded: bool) -> None:
        """Record the end of a call; the units of one that failed are not done."""
        running = dict(self.running)
        kind, units, begun, _ = running.pop(call.worker)
        if succeeded:
            self.ended = {**self.ended, kind: self._more(kind, units, begun, call.worker)}
            to_do = dict(self.to_do)
            to_do[kind] = max(to_do.get(kind, 0.0) - units, 0.0)
            self.to_do = to_do
        self.running = running

    def _more(self, kind: str, units: float, begun: float, worker: int) -> Measured:
        """Return the calls of a kind, with one more that has just ended on a worker."""
        now, seconds = self._clock(), self._clock() - begun
        constant = max(FRESH, (now - self._started) / 3)
        weight = math.exp((self._last.get(kind, now) - now) / constant)
        is_warm = (kind, worker) in self._warm
        self._warm.add((kind, worker))
        self._last[kind] = now
        recent = (units, seconds) if is_warm else (0.0, 0.0)
        return self.ended.get(kind, Measured()).aged(weight) + Measured(units, seconds, *recent)

    def existed(self) -> float:
        """Return the sum over useful workers of the seconds that they existed."""
        return self._existed + (self._clock() - self._looked) * self.workers

    def calls(self) -> list[Running]:
        """Return the running calls, the longest first."""
        now = self._clock()
        found = [
            Running(kind, units, now - begun, label)
            for kind, units, begun, label in self.running.values()
        ]
        return sorted(found, key=lambda call: -call.seconds)


class StageTally:
    """All dispatches of one stage."""

    def __init__(self) -> None:
        self._before: Mapping[str, Measured] = {}
        self._existed, self._count, self._of = 0.0, 0, ""
        self.current: Tally | None = None

    def open(self, tally: Tally) -> None:
        """Begin another dispatch; the counts of the one before it stay."""
        if (last := self.current) is not None:
            self._before = _sum(self._before, last.ended)
            self._existed += last.existed()
            if last.counted is not None:
                same = last.counted.of == self._of
                self._count = (self._count if same else 0) + last.counted.done
                self._of = last.counted.of
        self.current = tally

    def moment(self) -> Moment | None:
        """Return the state of the stage now; None before its first dispatch."""
        tally = self.current
        if tally is None or tally.counted is None:
            return None
        to_do = Counter(tally.to_do)
        to_do.update(tally.ahead.to_do)
        return Moment(
            to_do=dict(to_do),
            ended=_sum(self._before, tally.ended),
            running=tuple(tally.calls()),
            workers=tally.workers,
            existed=self._existed + tally.existed(),
        )

    def counted(self) -> Counted | None:
        """Return the count of the whole stage, in the unit of the present dispatch."""
        tally = self.current
        if tally is None or (found := tally.counted) is None:
            return None
        before = self._count if found.of == self._of else 0
        total = before + found.total + tally.ahead.count
        return Counted(before + found.done, total, found.of)


def _sum(one: Mapping[str, Measured], two: Mapping[str, Measured]) -> dict[str, Measured]:
    return {
        kind: one.get(kind, Measured()) + two.get(kind, Measured())
        for kind in dict.fromkeys([*one, *two])
    }
