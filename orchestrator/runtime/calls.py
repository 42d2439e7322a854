"""Commands, the calls that carry them, and the interface of schedules.

A command is a value that says what a worker does; a call gives it to one worker. A schedule is pure
state, without Ray and without tensors, so its decisions are tested as values: it is asked for calls
(`calls(idle)`), is informed of their ends (`succeeded`, `lost`) and of workers that are given up
(`retired`), and says when it has `finished`. `IndependentCalls` holds independent units;
`shard_pass` moves chunks through shards, `replicated_blocks` processes blocks sequentially, and
`stages.context.pipeline` trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from orchestrator.progress.tally import Counted
from orchestrator.store.places import Place


@dataclass(frozen=True, slots=True)
class Command:
    """Base of commands. Its fields are the keyword arguments of the worker's method `method`."""

    method: ClassVar[str]
    withheld: ClassVar[frozenset[str]] = frozenset()
    """Fields that the worker's dispatch reads and the method does not take."""

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the method."""
        names = [each.name for each in fields(self) if each.name not in self.withheld]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Open(Command):
    """Load a shard."""

    method: ClassVar[str] = "open"

    blocks: tuple[int, int]
    """Its first block, and the one after its last."""
    todo: tuple[int, ...] = ()
    """Its blocks whose unit is to be committed."""
    ahead: tuple[int, int] | None = None
    """Blocks that the worker is likely to hold next; their weights are read ahead."""
    about: tuple[Any, ...] = ()
    """Further arguments of `open`, such as the request for another kind of pass."""


@dataclass(frozen=True, slots=True)
class Step(Command):
    """Pass a chunk through the open shard."""

    method: ClassVar[str] = "step"

    index: int
    emit: bool = False
    """True if the output chunk is needed, and written to its file."""
    hand_over: bool = False
    """True if the output chunk is also returned with the result."""
    next_index: int | None = None
    """Chunk of the next step, which is read ahead; None: the step is the last one."""


@dataclass(frozen=True, slots=True)
class Finish(Command):
    """Commit the unit of a block, once all chunks have passed the open shard."""

    method: ClassVar[str] = "finish"

    block: int


@dataclass(frozen=True, slots=True)
class Verify(Command):
    """Compare files with their hashes."""

    method: ClassVar[str] = "verify"

    files: Sequence[tuple[Place, str]]
    """Files, each with its BLAKE2b."""


@dataclass(frozen=True, slots=True)
class Call:
    """A command for one worker: the unit of dispatch."""

    worker: int
    command: Command
    label: str
    """Name in messages: `blocks 2-3, chunk 17`."""
    shard: int = -1
    takes: tuple[int, int] | None = None
    """Input chunk, as (boundary, index)."""
    emits: tuple[int, int] | None = None
    """Output chunk, as (boundary, index)."""
    gathers: tuple[tuple[int, int], ...] = ()
    """Input chunks of a call that reads several, which other calls read too."""
    life: int = 0
    """Number of restarts of the schedule before the call. A schedule that restarts ignores the ends
    of calls of an earlier life."""

    @property
    def method(self) -> str:
        """Method of the worker, by which deadlines are kept."""
        return self.command.method


class Schedule(Protocol):
    """State that the dispatch loop drives."""

    @property
    def finished(self) -> bool: ...

    @property
    def max_workers(self) -> int:
        """Largest number of workers that can be busy from now on."""
        ...

    def calls(self, idle: Sequence[int], nodes: Mapping[int, str] = {}) -> list[Call]:
        """Calls to start now, at most one for each idle worker.

        Args:
            nodes: Nodes of the workers, as far as they are known.
        """
        ...

    def is_holding(self, worker: int) -> bool:
        """True if an idle worker has state that another one would have to compute again."""
        ...

    def succeeded(self, call: Call) -> None: ...

    def lost(self, call: Call) -> None:
        """Record that the worker of a running call is lost, with its state."""
        ...

    def retired(self, worker: int) -> None:
        """Record that an idle worker is given up; what it held is free."""
        ...

    def shrink_after_oom(self, call: Call) -> bool:
        """Reduce the memory footprint of a call that ran out of memory.

        Returns False if it cannot be reduced.
        """
        ...

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        """Record that an input chunk of a call is missing or damaged."""
        ...

    def share(self, call: Call) -> tuple[str, float]:
        """Kind of a call and its units of work, by which time is estimated (`progress.eta`)."""
        ...

    def to_do(self) -> Mapping[str, float]:
        """Units of work that have not ended, by kind, those of running calls included."""
        ...

    def counted(self) -> Counted:
        """Progress in a unit that users know."""
        ...


class IndependentCalls:
    """Independent units, started in order on idle workers.

    Args:
        units: Pairs of a label and a command.
        of: Plural noun for them in progress messages.
        work: Work of each by label, in any unit; None: all take the same time.
    """

    def __init__(
        self,
        units: Sequence[tuple[str, Command]],
        of: str = "units",
        work: Mapping[str, float] | None = None,
    ) -> None:
        self._waiting = list(units)
        self._work = work or {}
        self._total, self._of = len(self._waiting), of
        self._running: dict[int, tuple[str, Command]] = {}

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
                label, command = self._running[worker] = self._waiting.pop(0)
                calls.append(Call(worker, command, label))
        return calls

    def is_holding(self, worker: int) -> bool:
        return False

    def succeeded(self, call: Call) -> None:
        del self._running[call.worker]

    def lost(self, call: Call) -> None:
        self._waiting.insert(0, self._running.pop(call.worker))

    def retired(self, worker: int) -> None:
        """Between calls a worker has no state."""

    def shrink_after_oom(self, call: Call) -> bool:
        return False

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        raise AssertionError(f"{call.label} reads no chunk")

    def share(self, call: Call) -> tuple[str, float]:
        return call.method, self._work.get(call.label, 1.0)

    def to_do(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, command in (*self._waiting, *self._running.values()):
            found[command.method] = found.get(command.method, 0.0) + self._work.get(label, 1.0)
        return found

    def counted(self) -> Counted:
        return Counted(self._total - self.max_workers, self._total, self._of)
