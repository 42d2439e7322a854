"""What runs next: pure state, no Ray and no tensors, so every decision is tested as a value.

A schedule is asked for calls (`calls(idle)`), told what became of them (`succeeded`, `lost`) and of
workers that are given up (`retired`), and says when it is `finished`. `IndependentCalls` holds
independent units; `shard_pass` moves chunks through shards, `chain` through blocks one after the
other, and `pipeline` trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Call:
    """One method of one worker: the quantum of dispatch."""

    worker: int
    method: str
    arguments: tuple[Any, ...]
    label: str
    """What the call does, for messages: `blocks 2-3, chunk 17`."""
    shard: int = -1
    takes: tuple[int, int] | None = None
    """The chunk it reads, as (boundary, index)."""
    emits: tuple[int, int] | None = None
    """The chunk it gives, as (boundary, index)."""
    gathers: tuple[tuple[int, int], ...] = ()
    """Chunks that it reads together, as others do too."""


class Schedule(Protocol):
    """What the dispatch loop drives."""

    @property
    def finished(self) -> bool: ...

    @property
    def max_workers(self) -> int:
        """The most workers that can be at work from now on."""
        ...

    def calls(self, idle: Sequence[int], nodes: Mapping[int, str] = {}) -> list[Call]:
        """The calls to start now, at most one for each idle worker.

        Args:
            nodes: Where workers are, as far as it is known.
        """
        ...

    def is_holding(self, worker: int) -> bool:
        """Whether an idle worker has something that another would have to make again."""
        ...

    def succeeded(self, call: Call) -> None: ...

    def lost(self, call: Call) -> None:
        """The worker died, or gave up, in the middle of the call; its state is gone."""
        ...

    def retired(self, worker: int) -> None:
        """An idle worker is given up; what it held is free."""
        ...

    def shrink_after_oom(self, call: Call) -> bool:
        """Has less held at once than in this call, which is lost for want of memory; if it can."""
        ...

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        """A chunk that the call was to read is not there after all."""
        ...


class IndependentCalls:
    """Independent units, started in order on whoever is idle."""

    def __init__(self, method: str, units: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        self._method = method
        self._waiting = list(units)
        self._running: dict[int, tuple[str, tuple[Any, ...]]] = {}

    @property
    def finished(self) -> bool:
        return self.max_workers == 0

    @property
    def max_workers(self) -> int:
        return len(self._waiting) + len(self._running)

    def calls(self, idle: Sequence[int], nodes: Mapping[int, str] = {}) -> list[Call]:
        calls = []
        for worker in idle:
            if self._waiting and worker not in self._running:
                label, arguments = self._running[worker] = self._waiting.pop(0)
                calls.append(Call(worker, self._method, arguments, label))
        return calls

    def is_holding(self, worker: int) -> bool:
        return False

    def succeeded(self, call: Call) -> None:
        del self._running[call.worker]

    def lost(self, call: Call) -> None:
        self._waiting.insert(0, self._running.pop(call.worker))

    def retired(self, worker: int) -> None:
        """Between its calls a worker holds nothing."""

    def shrink_after_oom(self, call: Call) -> bool:
        return False

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        raise AssertionError(f"{call.label} reads no chunk")
