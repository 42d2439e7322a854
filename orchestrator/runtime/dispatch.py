"""Dispatch loop: calls of a schedule are executed by a pool, under a failure policy.

It knows neither Ray nor tensors.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from orchestrator.errors import OrchestratorError, WorkerError
from orchestrator.progress.tally import Ahead, Tally
from orchestrator.runtime.calls import Call, Finish, Schedule
from orchestrator.runtime.deadline import Deadlines
from orchestrator.runtime.policy import Action, Cause, Failure, FailurePolicy, check_nodes
from orchestrator.runtime.pool import PATIENCE_SECONDS, Outcome, Pool, describe
from orchestrator.runtime.scaling import to_give_back
from orchestrator.store.chunks import MissingChunk

POLL_SECONDS = 0.5
LOOK_SECONDS = 0.5
"""Minimum interval between counts of the work that is left."""
POLLED_SECONDS = 2.0
"""Interval between events while no call ends, at which a run may be ended."""
NAMED_CALLS = 3
"""Calls that a message about a wait names; the others are counted."""


def dispatch(
    pool: Pool,
    schedule: Schedule,
    policy: FailurePolicy,
    *,
    on_success: Callable[[Call, Any], None],
    is_awaited: Callable[[tuple[int, int]], bool] = lambda chunk: False,
    on_event: Callable[[dict[str, Any]], None],
    patience: Mapping[str, float] = {},
    tally: Tally | None = None,
) -> None:
    """Execute a schedule to its end.

    A call that exceeds its deadline (see `Deadlines`) is a failure, like the death of its worker.
    The policy decides what follows a failure; its decision is part of the failure's event.

    Args:
        on_success: Called with each successful call and its result.
        is_awaited: Whether an output chunk is kept in memory for the next worker that reads it; all
            others are released and read back from their files.
        on_event: Called on failures, on waits, with the memory of each call, and once at the end
            with the workers' utilisation.
        patience: By method, seconds that a call may take (see `Deadlines`).
        tally: Gets the progress.

    Raises:
        OrchestratorError: A call raised it, or the policy ended the run.
    """
    loop = _Loop(
        pool,
        schedule,
        policy,
        on_success=on_success,
        is_awaited=is_awaited,
        on_event=on_event,
        deadlines=Deadlines(patience),
        tally=tally or Tally(Ahead()),
    )
    loop.look()
    while not schedule.finished:
        loop.retire_draining()
        loop.start_calls()
        loop.scale()
        loop.look_again()
        outcomes = pool.wait(POLL_SECONDS)
        for outcome in outcomes or loop.overdue():
            loop.conclude(outcome)
        loop.report_waiting(bool(outcomes))
    loop.look()
    loop.report_utilisation()


class _Loop:
    """State of the dispatch loop: running calls with their start times, chunks in memory."""

    def __init__(
        self,
        pool: Pool,
        schedule: Schedule,
        policy: FailurePolicy,
        *,
        on_success: Callable[[Call, Any], None],
        is_awaited: Callable[[tuple[int, int]], bool],
        on_event: Callable[[dict[str, Any]], None],
        deadlines: Deadlines,
        tally: Tally,
    ) -> None:
        self._pool, self._schedule, self._policy = pool, schedule, policy
        self._on_success, self._is_awaited, self._on_event = on_success, is_awaited, on_event
        self._deadlines, self._tally = deadlines, tally
        self._records: dict[tuple[int, int], Any] = {}
        self._busy: dict[int, tuple[Call, float]] = {}
        self._idle: dict[int, float] = {}
        self._heard = self._polled = self._counted = self._looked = time.monotonic()
        self._busy_seconds = self._there_seconds = 0.0

    def retire_draining(self) -> None:
        """Replace idle workers on nodes that leave; busy ones may end their call first."""
        leaving = self._pool.nodes.leaving()
        if not leaving:
            return
        for worker, location in self._pool.workers().items():
            if location.node in leaving and worker not in self._busy:
                self._on_event({"event": "retired", **asdict(location)})
                self._schedule.retired(worker)
                self._pool.replace(worker)

    def start_calls(self) -> None:
        now = time.monotonic()
        workers = self._pool.workers()
        self._there_seconds += (now - self._counted) * len(workers)
        self._counted = now
        nodes = {
            worker: location.node
            for worker, location in workers.items()
            if worker not in self._busy
        }
        for call in self._schedule.calls(list(nodes), nodes):
            record = self._records.pop(call.takes, None) if call.takes else None
            gathered = [self._records.get(chunk) for chunk in call.gathers]
            if isinstance(call.command, Finish):
                about = {"block": call.command.block, "unit": call.label}
                self._on_event({"event": "finishing", **about, **asdict(workers[call.worker])})
            self._pool.start(call, gathered or record)
            self._busy[call.worker] = (call, time.monotonic())
            self._tally.begun(call, *self._schedule.share(call))
        self._records = {
            chunk: record for chunk, record in self._records.items() if self._is_awaited(chunk)
        }

    def look(self) -> None:
        """Count the work that is left."""
        schedule = self._schedule
        self._tally.look(
            schedule.to_do(),
            schedule.counted(),
            present=len(self._pool.workers()),
            useful=schedule.max_workers,
        )
        self._looked = time.monotonic()

    def look_again(self) -> None:
        """Count it unless it was counted just before, since a count takes time of its own."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.look()

    def scale(self) -> None:
        """Adapt the number of workers to the schedule; give back idle surplus workers."""
        now = time.monotonic()
        workers = self._pool.workers()
        idle_workers = [worker for worker in workers if worker not in self._busy]
        free = [each for each in idle_workers if not self._schedule.is_holding(each)]
        self._idle = {each: self._idle.get(each, now) for each in free}
        surplus = self._pool.scale(self._schedule.max_workers)
        idle = {worker: now - since for worker, since in self._idle.items()}
        for worker in to_give_back(idle, surplus):
            self._on_event({"event": "returned", **asdict(workers[worker])})
            self._schedule.retired(worker)
            self._pool.give_back(worker)

    def overdue(self) -> list[Outcome]:
        """End the calls that have exceeded their deadline. Returns their outcomes."""
        now = time.monotonic()
        outcomes: list[Outcome] = []
        for call, begun in self._busy.values():
            deadline = self._deadlines.of(call.method)
            if now - begun > deadline:
                why = f"no answer for {now - begun:.0f} s, at most {deadline:.0f} s are allowed"
                outcomes += self._pool.abandon(call, why)
        return outcomes

    def conclude(self, outcome: Outcome) -> None:
        """Record the outcome of a call in the schedule, and do what the policy decides."""
        call = outcome.call
        _, begun = self._busy.pop(call.worker)
        self._busy_seconds += time.monotonic() - begun
        self._tally.over(call, succeeded=outcome.lost is None and outcome.error is None)
        if outcome.lost is not None:
            self._conclude_loss(outcome)
        elif isinstance(outcome.error, MissingChunk):
            self._on_event({"event": "missing", "unit": call.label})
            if (ending := self._policy.after_missing(call.label).error) is not None:
                raise ending
            self._schedule.input_missing(call, outcome.error.chunk)
        elif outcome.error is not None:
            error = wrap_error(outcome.error, call)
            self._report_failure(outcome, str(error), cause="raised an error", action=Action.END)
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
        node = self._pool.workers()[call.worker].node
        nodes = self._pool.nodes
        is_split = outcome.cause is Cause.OUT_OF_MEMORY and self._schedule.shrink_after_oom(call)
        failure = Failure(call.label, node, outcome.cause, why)
        decision = self._policy.after_failure(failure, nodes.available(), is_split=is_split)
        self._report_failure(outcome, why, cause=outcome.cause, action=decision.action)
        if decision.error is not None:
            raise decision.error
        # other workers of a quarantined node may fail on their last call
        if decision.action is Action.QUARANTINE and node not in nodes.quarantined():
            nodes.quarantine(node)
            self._on_event({"event": "quarantined", "node": node})
        self._schedule.lost(call)
        self._pool.replace(call.worker)

    def _report_failure(self, outcome: Outcome, why: str, *, cause: str, action: Action) -> None:
        self._on_event(
            {
                "event": "failed" if outcome.lost is None else "lost",
                "unit": outcome.call.label,
                "why": why,
                "cause": str(cause),
                "decided": str(action),
                **asdict(self._pool.workers()[outcome.call.worker]),
                "log": outcome.log,
            }
        )

    def report_utilisation(self) -> None:
        """Report the seconds that workers spent in calls, of the seconds that they existed."""
        there = self._there_seconds + (time.monotonic() - self._counted) * len(self._pool.workers())
        self._on_event({"event": "busy", "seconds": self._busy_seconds, "of": there})

    def report_waiting(self, heard: bool) -> None:
        """Report what the loop waits for, if no call has ended for `PATIENCE_SECONDS`.

        Before that, `polled` events let the receiver end the run.

        Args:
            heard: Whether a call has just ended.

        Raises:
            WorkerError: There is no worker, and no node that may hold one.
        """
        now = time.monotonic()
        if heard:
            self._heard = self._polled = now
        if now - self._polled > POLLED_SECONDS:
            self._polled = now
            self._on_event({"event": "polled"})
        if now - self._heard > PATIENCE_SECONDS:
            self._heard = now
            nodes = self._pool.nodes
            there = describe(len(self._pool.workers()), nodes)
            self._on_event({"event": "waiting", "for": self._awaited(), "there": there})
            if not self._pool.workers() and not nodes.is_growing:
                check_nodes(nodes.available(), nodes.quarantined())

    def _awaited(self) -> str:
        """Labels of the running calls; a worker, if none runs."""
        labels = [call.label for call, _ in self._busy.values()]
        if not labels:
            return "a worker"
        more = len(labels) - NAMED_CALLS
        return "; ".join(labels[:NAMED_CALLS]) + (f" and {more} more" if more > 0 else "")


def wrap_error(error: BaseException, call: Call) -> OrchestratorError:
    """Return our own errors unchanged, others as a WorkerError with the unit's name."""
    if isinstance(error, OrchestratorError):
        return error
    cause = getattr(error, "cause", None) or error
    wrapped = WorkerError(f"{call.label}: {type(cause).__name__}: {cause}")
    wrapped.__cause__ = error
    return wrapped
