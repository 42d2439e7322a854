"""Pool for tests of schedules and of the dispatch loop: calls end as a test decides."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from orchestrator.errors import OrchestratorError
from orchestrator.runtime.calls import Call
from orchestrator.runtime.policy import Cause
from orchestrator.runtime.pool import FixedPool, NodeSet, Outcome, WorkerLocation
from orchestrator.store.chunks import MissingChunk

Fate = Mapping[str, Any] | Literal["hang"] | None
"""Fields of the `Outcome` of a call that is not executed; "hang": it does not end; None: it is
executed."""
MAX_CALLS = 100_000
"""Calls after which a schedule is taken not to end."""


def scripted(script: Sequence[tuple[str, Fate]]) -> Callable[[Call, str], Fate]:
    """Fates of calls by label or by node; each entry applies to one call, the first one that fits.

    Args:
        script: Pairs of a label or a node's name, and the fate.
    """
    left = list(script)

    def fate(call: Call, node: str) -> Fate:
        for entry in left:
            if entry[0] in (call.label, node):
                left.remove(entry)
                return entry[1]
        return None

    return fate


class ScriptedPool(FixedPool):
    """Workers without processes, spread over the nodes in turn.

    It asserts that the dispatch loop keeps the rules of a pool: one call at a time per worker, no
    call on a node that leaves, no wait while nothing runs.

    Args:
        execute: Result and output chunk of a call, given its input chunk; what it raises is the
            call's error.
        fate: Fate of a call that ends, given the name of its node; see `scripted`.
        order: Source of the order in which calls end; None: the order in which they started.
        drains: By node, the number of started calls after which it drains.
        growing_to: Number of workers for which there is room; 0: the pool does not grow.
    """

    def __init__(
        self,
        workers: int,
        execute: Callable[[Call, Any], tuple[Any, Any]],
        fate: Callable[[Call, str], Fate] = lambda call, node: None,
        *,
        order: random.Random | None = None,
        nodes: Sequence[str] = ("a",),
        drains: Mapping[str, int] = {},
        growing_to: int = 0,
    ) -> None:
        super().__init__(NodeSet(set(nodes), is_growing=growing_to > 0))
        self._execute, self._fate, self._order = execute, fate, order
        self._drains, self._growing_to = drains, growing_to
        self._locations: dict[int, WorkerLocation] = {}
        self._count = 0
        self._running: list[tuple[Call, Any]] = []
        self._hanging: list[Call] = []
        self._idle_waits = 0
        self.started: list[str] = []
        """Labels of all started calls."""
        self.records: dict[str, Any] = {}
        """By label, the input chunks that calls were started with."""
        self.abandoned: list[str] = []
        """Labels of calls that were ended while they hung."""
        self.asked: list[int] = []
        """Numbers of workers that the schedule could use, as it was asked for them."""
        for _ in range(workers):
            self.add()
        self._drain()

    @property
    def running(self) -> Sequence[Call]:
        """Calls that have started and not ended, those that hang excepted."""
        return [call for call, _ in self._running]

    def _drain(self) -> None:
        """Drain the nodes whose number of started calls is reached."""
        self.nodes.draining |= {
            node for node, calls in self._drains.items() if len(self.started) >= calls
        }

    def add(self) -> None:
        """Add a worker."""
        nodes = sorted(self.nodes.available())
        node = nodes[self._count % len(nodes)]
        self._locations[self._count] = WorkerLocation(node, self._count)
        self._count += 1

    def workers(self) -> Mapping[int, WorkerLocation]:
        return dict(self._locations)

    def start(self, call: Call, record: Any) -> None:
        assert self._locations[call.worker].node in self.nodes.available(), "its node leaves"
        assert all(call.worker != each.worker for each, _ in self._running)
        # a schedule or a policy that repeats calls without end would block the test
        assert len(self.started) < MAX_CALLS, "the schedule does not end"
        self.started.append(call.label)
        self.records[call.label] = record
        self._running.append((call, record))

    def wait(self, seconds: float) -> list[Outcome]:
        self._drain()
        if not self._running:
            self._idle_waits += bool(self._locations) and not self._hanging
            assert self._idle_waits < 3, "no call runs and the schedule is not finished"
            return []
        self._idle_waits = 0
        place = self._order.randrange(len(self._running)) if self._order else 0
        call, record = self._running.pop(place)
        fate = self._fate(call, self._locations[call.worker].node)
        if fate == "hang":
            self._hanging.append(call)
            return []
        if fate is not None:
            return [Outcome(call, **fate)]
        try:
            value, emitted = self._execute(call, record)
        except (OrchestratorError, MissingChunk) as error:
            return [Outcome(call, error=error)]
        return [Outcome(call, value, emitted)]

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        if call not in self._hanging:
            # it has been started and would end, so the real pool would find its result
            (record,) = (record for each, record in self._running if each is call)
            self._running.remove((call, record))
            return [Outcome(call, *self._execute(call, record))]
        self._hanging.remove(call)
        self.abandoned.append(call.label)
        return [Outcome(call, lost=why, cause=Cause.HUNG, log="stacks")]

    def replace(self, worker: int) -> None:
        del self._locations[worker]
        self.add()

    def scale(self, max_workers: int) -> int:
        self.asked.append(max_workers)
        while self.nodes.available() and len(self._locations) < min(max_workers, self._growing_to):
            self.add()
        return max(0, len(self._locations) - max_workers)

    def give_back(self, worker: int) -> None:
        assert all(call.worker != worker for call, _ in self._running)
        del self._locations[worker]
