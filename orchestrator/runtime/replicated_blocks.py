"""Schedule that processes blocks sequentially; all workers replicate the current block.

One block is processed at a time. Every worker that is ready when it begins is a replica: it holds
the block and takes part in all of its rounds. The block's program yields rounds. A round has parts,
which the replicas share; their values are sent to the program, which yields the next round. Pure
state, without Ray and without tensors.

Rules, asserted by the tests:

- Each replica is called in each round, in the order of the rounds, even if there is no part for it.
  None begins a round before all have ended the previous one, so all go through the same states.
- In a round that merges, each part makes a record. All replicas read all of these records with
  their first call of the next round. A single replica keeps what it made, and makes all parts in
  order.
- Parts of a replica that is lost during a round are made by the others, which are in the same
  state. The loss of the last replica restarts the block.
- If a record is lost, the block begins again; calls that still run are awaited, and their results
  ignored. If the block's input is lost, all blocks up to it are processed again.
- A worker that comes later takes part from the next block on. One is enough.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from orchestrator.errors import WorkerError
from orchestrator.progress.tally import Counted
from orchestrator.runtime.calls import Call, Command


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCommand(Command):
    """Base of the commands of a round. The schedule fills these fields for each call.

    A replica's result is a dict: `parts`, the value of each part by its number, and `state`, what
    all replicas must have in common; that of a replica's first call of the round counts.
    """

    withheld: ClassVar[frozenset[str]] = frozenset({"is_first", "reads", "emits"})

    parts: tuple[int, ...] = ()
    """Parts of the round for this call."""
    is_first: bool = False
    """True for the replica's first call of the round."""
    reads: bool = False
    """True if it reads the records of the previous round."""
    emits: bool = False
    """True if it gives a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A command that all replicas execute before any of them begins the next round."""

    command: ReplicaCommand
    what: str
    """Name in messages: `epoch 3, step 2`."""
    parts: int = 0
    """Number of parts that the replicas share."""
    merges: bool = False
    """True if each part makes a record, which all replicas read before they continue."""


@dataclass(frozen=True, slots=True)
class Found:
    """Result of a round."""

    values: list[Any]
    """Values of its parts, in order."""
    state: Any
    """State that each replica reported with its first call of the round; all are equal."""


Program = Generator[Round, Found, Any]


class ReplicatedBlocks:
    """Blocks that are processed one after the other, each from the output of the previous one.

    It begins at the last boundary whose chunks are stored, before the first block to make, and ends
    after the last block to make.

    Args:
        todo: Blocks to make.
        present: Blocks whose input is stored completely; that of block 0 always is.
        program: Rounds of a block, given its number and whether it is made already.
        outline: Parts of the rounds of a block that is made, by method; those of the last block
            that was made take precedence.
    """

    def __init__(
        self,
        *,
        todo: Iterable[int],
        present: Iterable[int],
        program: Callable[[int, bool], Program],
        outline: Mapping[str, float] = {},
    ) -> None:
        self._todo = set(todo)
        self._total, self._outline = len(self._todo), dict(outline)
        first = min(self._todo, default=0)
        self._block = max(block for block in (0, *present) if block <= first)
        self._program = program
        self._ended: list[tuple[int, Any]] = []
        self._running: set[int] = set()
        self._waiting: list[int] = []
        self._life = self._serial = 0
        self._most_parts = 1
        # whether the current round is the first of its block, which reads the block's input
        self._is_entering = False
        self._rest_here()

    def _rest_here(self) -> None:
        """Reset to the state in which no block is processed."""
        self._rounds: Program | None = None
        self._replicas: list[int] = []
        self._done_here: dict[str, float] = {}
        self._emitted: list[tuple[int, int]] = []
        self._open(None)

    @property
    def finished(self) -> bool:
        return not self._todo

    @property
    def max_workers(self) -> int:
        return self._most_parts

    def ended(self) -> list[tuple[int, Any]]:
        """Blocks that ended since the last call of this method, with their programs' results."""
        ended, self._ended = self._ended, []
        return ended

    def calls(self, idle: Sequence[int], nodes: Mapping[int, str] = {}) -> list[Call]:
        if self._round is None and not self._begin(sorted(idle)):
            return []
        fresh = [worker for worker in self._replicas if worker not in self._entered]
        calls = []
        # parts of a lost replica go to those that have done their own
        ready = fresh or [each for each in self._replicas if each not in self._running]
        for place, worker in enumerate(ready):
            share = -(-len(self._waiting) // (len(ready) - place))
            parts, self._waiting = self._waiting[:share], self._waiting[share:]
            if parts or worker in fresh:
                calls.append(self._call(worker, tuple(parts)))
        return calls

    def _begin(self, idle: list[int]) -> bool:
        """Start the current block with the idle workers. Returns False if it cannot start yet."""
        if self._running or not idle or self.finished:
            return False
        self._replicas = idle
        self._is_entering = True
        self._rounds = self._program(self._block, self._block not in self._todo)
        self._open(next(self._rounds))
        return True

    def _open(self, each: Round | None) -> None:
        """Open the next round, in which all replicas read the records of the previous one."""
        self._round = each
        self._waiting = list(range(each.parts)) if each else []
        self._most_parts = max(self._most_parts, len(self._waiting))
        self._entered: set[int] = set()
        self._values: dict[int, Any] = {}
        self._states: dict[int, Any] = {}
        self._gathered, self._emitted = tuple(sorted(self._emitted)), []
        self._emits = each is not None and each.merges and len(self._replicas) > 1

    def _call(self, worker: int, parts: tuple[int, ...]) -> Call:
        assert self._round is not None
        is_first = worker not in self._entered
        gathers = self._gathered if is_first else ()
        emits = None
        if self._emits and parts:
            self._serial += 1
            emits = (self._block, self._serial)
        self._entered.add(worker)
        self._running.add(worker)
        # named by its parts, so that a part that kills each worker is told from other failures
        which = f"part {parts[0]}-{parts[-1]}" if parts else f"replica {worker}"
        command = replace(
            self._round.command,
            parts=parts,
            is_first=is_first,
            reads=bool(gathers),
            emits=emits is not None,
        )
        return Call(
            worker,
            command,
            f"block {self._block}, {self._round.what}, {which}",
            emits=emits,
            gathers=gathers,
            life=self._life,
        )

    def is_holding(self, worker: int) -> bool:
        return worker in self._replicas

    def is_awaited(self, chunk: tuple[int, int]) -> bool:
        """True if replicas are still to read a record."""
        all_have_read = self._entered.issuperset(self._replicas)
        return chunk in self._emitted or (chunk in self._gathered and not all_have_read)

    def succeeded(self, call: Call) -> None:
        self._running.discard(call.worker)
        if self._counts(call):
            kind, units = self.share(call)
            self._done_here[kind] = self._done_here.get(kind, 0.0) + units
            if call.emits is not None:
                self._emitted.append(call.emits)

    def record_result(self, call: Call, value: dict[str, Any]) -> None:
        """Record the result of a successful call.

        Raises:
            WorkerError: The replicas' states differ.
        """
        if not self._counts(call):
            return
        self._values |= value["parts"]
        if _command(call).is_first:
            self._states[call.worker] = value["state"]
            # compared as text, because NaN is not equal to itself
            if len({repr(state) for state in self._states.values()}) > 1:
                raise WorkerError(
                    f"{call.label}: the states of the workers that share it differ: "
                    f"{self._states}; all must compute the same bits, so look for a machine or "
                    "memory that differs from the others, or use --workers 1"
                )
        self._settle()

    def lost(self, call: Call) -> None:
        self._running.discard(call.worker)
        if not self._counts(call):
            return
        self._waiting = sorted([*self._waiting, *_command(call).parts])
        self.retired(call.worker)

    def retired(self, worker: int) -> None:
        """Remove a replica; its results stay, and the other replicas hold the same state."""
        if worker not in self._replicas:
            return
        self._replicas.remove(worker)
        if self._replicas:
            self._settle()
        else:
            self._anew()

    def shrink_after_oom(self, call: Call) -> bool:
        """Return False: a replica holds one block, which cannot be reduced."""
        return False

    def input_missing(self, call: Call, chunk: tuple[int, int]) -> None:
        """Begin the block again, or the first one if the input of the block is missing."""
        self._running.discard(call.worker)
        if self._counts(call):
            if self._is_entering:
                self._block = 0
            self._anew()

    def _counts(self, call: Call) -> bool:
        """True if a call is one of this life."""
        return call.life == self._life

    def _anew(self) -> None:
        self._life += 1
        self._rest_here()

    def _settle(self) -> None:
        """Open the next round if this one is done."""
        if self._waiting or self._running or not self._entered.issuperset(self._replicas):
            return
        assert self._rounds is not None
        state = next(iter(self._states.values()), None)
        found = Found([self._values[part] for part in sorted(self._values)], state)
        try:
            following = self._rounds.send(found)
        except StopIteration as end:
            self._ended.append((self._block, end.value))
            if self._block in self._todo:
                self._outline = dict(self._done_here)
            self._todo.discard(self._block)
            self._block += 1
            self._anew()
        else:
            self._is_entering = False
            self._open(following)

    def share(self, call: Call) -> tuple[str, float]:
        """Parts of the round; a round without parts counts as one, shared by the replicas."""
        command = _command(call)
        whole = self._round is None or not self._round.parts
        units = 1 / max(len(self._replicas), 1) if whole else float(len(command.parts))
        return command.method, units

    def to_do(self) -> dict[str, float]:
        """Parts by method, as if all blocks that are made were alike."""
        found = {kind: units * len(self._todo) for kind, units in self._outline.items()}
        for kind, units in self._done_here.items():
            if self._block in self._todo and kind in found:
                found[kind] -= min(units, self._outline[kind])
        return found

    def counted(self) -> Counted:
        return Counted(self._total - len(self._todo), self._total, "blocks")


def _command(call: Call) -> ReplicaCommand:
    assert isinstance(call.command, ReplicaCommand)
    return call.command
