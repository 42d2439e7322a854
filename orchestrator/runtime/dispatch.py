"""The dispatch loop, which knows neither Ray nor tensors.

It asks a schedule what to start, a pool to start it, and a failure policy what a failed call means.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.errors import OrchestratorError, WorkerError
from orchestrator.runtime.calls import Call, Schedule
from orchestrator.runtime.deadline import Deadlines
from orchestrator.runtime.policy import Action, Cause, Failure, FailurePolicy, check_nodes
from orchestrator.runtime.pool import PATIENCE_SECONDS, Outcome, Pool
from orchestrator.runtime.scaling import to_give_back
from orchestrator.store.chunks import MissingChunk

POLL_SECONDS = 0.5
NAMED_CALLS = 3
"""Calls that a message about waiting names; of the others it gives the number."""


def dispatch(
    pool: Pool,
    schedule: Schedule,
    policy: FailurePolicy,
    *,
    on_success: Callable[[Call, Any], None],
    is_awaited: Callable[[tuple[int, int]], bool] = lambda chunk: False,
    on_event: Callable[[dict[str, Any]], None],
    patience: Mapping[str, float] = {},
) -> None:
    """Performs a schedule to its end.

    A call that runs past its deadline (see `Deadlines`) is a failure as its worker's death is. What
    a failure means is the policy's to say; what it decided is in the event that tells of it.

    Args:
        on_success: Told of each call that ended well, with its small result.
        is_awaited: Whether an emitted chunk is held for the worker that takes it next; all others
            are let go and read back from their files.
        on_event: Told of failures, of long waits, of the memory of each call and, at the end, of
            how busy the workers were.
        patience: By method, seconds that a call may take (see `Deadlines`).

    Raises:
        OrchestratorError: A call raised it, or the policy gave up.
    """
    loop = _Loop(pool, schedule, policy, on_success, is_awaited, on_event, Deadlines(patience))
    while not schedule.finished:
        loop.retire_draining()
        loop.start_calls()
        loop.scale()
        outcomes = pool.wait(POLL_SECONDS)
        for outcome in outcomes or loop.overdue():
            loop.conclude(outcome)
        loop.report_waiting(bool(outcomes))
    loop.report_utilisation()


class _Loop:
    """What the dispatch loop knows as it goes round: who is at what, since when."""

    def __init__(
        self,
        pool: Pool,
        schedule: Schedule,
        policy: FailurePolicy,
        on_success: Callable[[Call, Any], None],
        is_awaited: Callable[[tuple[int, int]], bool],
        on_event: Callable[[dict[str, Any]], None],
        deadlines: Deadlines,
    ) -> None:
        self._pool, self._schedule, self._policy = pool, schedule, policy
        self._on_success, self._is_awaited, self._on_event = on_success, is_awaited, on_event
        self._deadlines = deadlines
        self._records: dict[tuple[int, int], Any] = {}
        self._busy: dict[int, tuple[Call, float]] = {}
        self._idle: dict[int, float] = {}
        self._heard = self._counted = time.monotonic()
        self._busy_seconds = self._there_seconds = 0.0

    def retire_draining(self) -> None:
        """Puts others in the place of idle workers whose nodes go; busy ones may end their call."""
        for worker in self._pool.leaving():
            if worker not in self._busy:
                self._on_event({"event": "retired", **asdict(self._pool.location(worker))})
                self._schedule.retired(worker)
                self._pool.replace(worker)

    def start_calls(self) -> None:
        now = time.monotonic()
        self._there_seconds += (now - self._counted) * len(self._pool.workers())
        self._counted = now
        idle = self._idle_workers()
        nodes = {worker: self._pool.location(worker).node for worker in idle}
        for call in self._schedule.calls(idle, nodes):
            record = self._records.pop(call.takes, None) if call.takes else None
            gathered = [self._records.get(chunk) for chunk in call.gathers]
            self._pool.start(call, gathered or record)
            self._busy[call.worker] = (call, time.monotonic())
        self._records = {
            chunk: record for chunk, record in self._records.items() if self._is_awaited(chunk)
        }

    def _idle_workers(self) -> list[int]:
        return [worker for worker in self._pool.workers() if worker not in self._busy]

    def scale(self) -> None:
        """Has workers come for what can be used, and gives back those that it is too little for."""
        now = time.monotonic()
        free = [each for each in self._idle_workers() if not self._schedule.is_holding(each)]
        self._idle = {each: self._idle.get(each, now) for each in free}
        spare = self._pool.scale(self._schedule.max_workers)
        idle = {worker: now - since for worker, since in self._idle.items()}
        for worker in to_give_back(idle, spare):
            self._on_event({"event": "returned", **asdict(self._pool.location(worker))})
            self._schedule.retired(worker)
            self._pool.give_back(worker)

    def overdue(self) -> list[Outcome]:
        """The calls that have run past their deadline, ended."""
        now = time.monotonic()
        outcomes: list[Outcome] = []
        for call, begun in self._busy.values():
            deadline = self._deadlines.of(call.method)
            if now - begun > deadline:
                why = f"no answer for {now - begun:.0f} s, at most {deadline:.0f} s are allowed"
                outcomes += self._pool.abandon(call, why)
        return outcomes

    def conclude(self, outcome: Outcome) -> None:
        """Tells the schedule what became of a call, and performs what the policy decides."""
        call = outcome.call
        _, begun = self._busy.pop(call.worker)
        self._busy_seconds += time.monotonic() - begun
        if outcome.lost is not None:
            self._conclude_loss(outcome)
        elif isinstance(outcome.error, MissingChunk):
            self._on_event({"event": "missing", "unit": call.label})
            if (ending := self._policy.after_missing(call.label).error) is not None:
                raise ending
            self._schedule.input_missing(call, outcome.error.chunk)
        elif outcome.error is not None:
            error = wrap_error(outcome.error, call)
            self._tell("failed", outcome, str(error), "raised an error", Action.END)
            raise error
        else:
            self._deadlines.note(call.method, time.monotonic() - begun)
            if outcome.usage is not None:
                self._on_event({"event": "memory", **outcome.usage.to_json()})
            self._schedule.succeeded(call)
            self._on_success(call, outcome.value)
            if outcome.record is not None and call.emits and self._is_awaited(call.emits):
                self._records[call.emits] = outcome.record

    def _conclude_loss(self, outcome: Outcome) -> None:
        call, why = outcome.call, outcome.lost or ""
        node = self._pool.location(call.worker).node
        is_split = outcome.cause is Cause.OUT_OF_MEMORY and self._schedule.shrink_after_oom(call)
        failure = Failure(call.label, node, outcome.cause, why)
        decision = self._policy.after_failure(failure, self._pool.nodes(), is_split=is_split)
        self._tell("lost", outcome, why, outcome.cause, decision.action)
        if decision.error is not None:
            raise decision.error
        # its other workers may fail on their last call
        if decision.action is Action.QUARANTINE and node not in self._pool.quarantined():
            self._pool.quarantine(node)
            self._on_event({"event": "quarantined", "node": node})
        self._schedule.lost(call)
        self._pool.replace(call.worker)

    def _tell(self, name: str, outcome: Outcome, why: str, cause: str, action: Action) -> None:
        self._on_event(
            {
                "event": name,
                "unit": outcome.call.label,
                "why": why,
                "cause": str(cause),
                "decided": str(action),
                **asdict(self._pool.location(outcome.call.worker)),
                "log": outcome.log,
            }
        )

    def report_utilisation(self) -> None:
        """Tells how long workers were at a call, of all the time that they were there."""
        there = self._there_seconds + (time.monotonic() - self._counted) * len(self._pool.workers())
        self._on_event({"event": "busy", "seconds": self._busy_seconds, "of": there})

    def report_waiting(self, heard: bool) -> None:
        """Says for what the loop waits, when nothing was heard for long.

        Raises:
            WorkerError: It waits for workers, and no node may hold one.
        """
        now = time.monotonic()
        if heard:
            self._heard = now
        if now - self._heard > PATIENCE_SECONDS:
            self._heard = now
            there = self._pool.describe()
            self._on_event({"event": "waiting", "for": self._awaited(), "there": there})
            if not self._pool.workers() and not self._pool.is_growing():
                check_nodes(self._pool.nodes(), self._pool.quarantined())

    def _awaited(self) -> str:
        """The calls that are under way, or a worker to perform any."""
        labels = [call.label for call, _ in self._busy.values()]
        if not labels:
            return "a worker"
        more = len(labels) - NAMED_CALLS
        return "; ".join(labels[:NAMED_CALLS]) + (f" and {more} more" if more > 0 else "")


def wrap_error(error: BaseException, call: Call) -> OrchestratorError:
    """Our own errors as they are; anything else with the unit's name, and its traceback behind."""
    if isinstance(error, OrchestratorError):
        return error
    cause = getattr(error, "cause", None) or error
    wrapped = WorkerError(f"{call.label}: {type(cause).__name__}: {cause}")
    wrapped.__cause__ = error
    return wrapped
