"""Where calls are performed: the interface of a pool, the dispatch loop, and a pool without Ray.

The loop knows neither Ray nor tensors. It asks a schedule what to start, a pool to start it, and
a failure policy what a lost worker means.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.cluster.policy import FailurePolicy
from orchestrator.cluster.schedule import Call, Schedule
from orchestrator.errors import OrchestratorError, WorkerError
from orchestrator.store.chunks import MissingChunk

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call."""

    call: Call
    value: Any = None
    """The method's small result."""
    record: Any = None
    """The chunk that it emitted: a value or a reference; nothing when there is none."""
    error: BaseException | None = None
    """What the method raised; it will raise it again on any worker."""
    lost: str | None = None
    """Why the worker is gone; the call itself is not to blame."""


class Pool(Protocol):
    """Equal workers, each performing one call at a time."""

    def workers(self) -> Sequence[int]: ...

    def start(self, call: Call, record: Any) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """The calls that ended; empty when none did in that time."""
        ...

    def replace(self, worker: int) -> None:
        """Puts a fresh worker in the place of a lost one, under a new number."""
        ...

    def describe(self) -> str:
        """What is there, for messages about waiting."""
        ...


class LocalPool:
    """One worker in this process: the same units and bits, without Ray."""

    def __init__(self, make_worker: Callable[[], Any]) -> None:
        self.worker = make_worker()
        self._calls: deque[tuple[Call, Any]] = deque()

    def workers(self) -> Sequence[int]:
        return [0]

    def start(self, call: Call, record: Any) -> None:
        self._calls.append((call, record))

    def wait(self, seconds: float) -> list[Outcome]:
        call, record = self._calls.popleft()
        try:
            value, emitted = self.worker.perform(call.method, call.arguments, record)
        except Exception as error:
            return [Outcome(call, error=error)]
        return [Outcome(call, value, emitted)]

    def replace(self, worker: int) -> None:
        raise AssertionError("a worker in this process is never lost")

    def describe(self) -> str:
        return "one worker in this process"


def dispatch(
    pool: Pool,
    schedule: Schedule,
    policy: FailurePolicy,
    *,
    on_success: Callable[[Call, Any], None],
    is_awaited: Callable[[tuple[int, int]], bool] = lambda chunk: False,
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    """Performs a schedule to its end.

    Args:
        on_success: Told of each call that ended well, with its small result.
        is_awaited: Whether an emitted chunk is held for the worker that takes it next; all others
            are let go and read back from their files.
        on_event: Told of lost workers and of long waits.

    Raises:
        OrchestratorError: A call raised it, or the policy gave up.
    """
    records: dict[tuple[int, int], Any] = {}
    busy: set[int] = set()
    heard = time.monotonic()
    while not schedule.finished:
        idle = [worker for worker in pool.workers() if worker not in busy]
        for call in schedule.calls(idle):
            record = records.pop(call.takes, None) if call.takes else None
            pool.start(call, record)
            busy.add(call.worker)
        records = {chunk: record for chunk, record in records.items() if is_awaited(chunk)}
        outcomes = pool.wait(POLL_SECONDS)
        if outcomes:
            heard = time.monotonic()
        elif time.monotonic() - heard > PATIENCE_SECONDS:
            heard = time.monotonic()
            on_event({"event": "waiting", "for": f"{len(busy)} calls", "there": pool.describe()})
        for outcome in outcomes:
            call = outcome.call
            busy.discard(call.worker)
            if outcome.lost is not None:
                on_event({"event": "lost", "unit": call.label, "why": outcome.lost})
                policy.after_loss(call.label, outcome.lost)
                schedule.lost(call)
                pool.replace(call.worker)
            elif isinstance(outcome.error, MissingChunk):
                on_event({"event": "missing", "unit": call.label})
                policy.after_missing(call.label)
                schedule.missing(call)
            elif outcome.error is not None:
                raise as_ours(outcome.error, call)
            else:
                schedule.succeeded(call)
                on_success(call, outcome.value)
                if outcome.record is not None and call.emits and is_awaited(call.emits):
                    records[call.emits] = outcome.record


def as_ours(error: BaseException, call: Call) -> OrchestratorError:
    """Our own errors as they are; anything else with the unit's name, and its traceback behind."""
    if isinstance(error, OrchestratorError):
        return error
    cause = getattr(error, "cause", None) or error
    wrapped = WorkerError(f"{call.label}: {type(cause).__name__}: {cause}")
    wrapped.__cause__ = error
    return wrapped
