"""Where calls are performed: the interface of a pool, and a pool without Ray."""

import os
import socket
import traceback
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import WorkerError
from orchestrator.runtime.calls import Call
from orchestrator.runtime.losses import cause_of_loss, summary
from orchestrator.runtime.policy import Cause
from orchestrator.usage import Usage

PATIENCE_SECONDS = 30.0
"""Whatever is waited for longer is said, again and again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call."""

    call: Call
    value: Any = None
    """The method's small result."""
    record: Any = None
    """The chunk that it emitted: a value or a reference; nothing when there is none."""
    usage: Usage | None = None
    """Peak memory of the call."""
    error: BaseException | None = None
    """What the method raised; it will raise it again on any worker."""
    lost: str | None = None
    """Why the worker is gone, or of no use any more."""
    cause: Cause = Cause.DIED
    """What kind of loss that is."""
    log: str = ""
    """Of a failure, what was found to explain it: a traceback, stacks, the end of a log."""


@dataclass(frozen=True, slots=True)
class WorkerLocation:
    """Where a worker is."""

    node: str
    """The node's name, which no other node of the pool has."""
    pid: int


class Pool(Protocol):
    """Equal workers, each performing one call at a time."""

    def turn_to(self, worker_class: type, task: Any) -> None:
        """Has the workers take up another task; what they hold of the one before is let go."""
        ...

    def gather(self) -> list[dict[str, Any]]:
        """Waits until there are enough workers; gives what each proves of where it is."""
        ...

    def workers(self) -> Sequence[int]: ...

    def location(self, worker: int) -> WorkerLocation: ...

    def start(self, call: Call, record: Any) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """The calls that ended; empty when none did in that time."""
        ...

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        """Ends a call that is taken to hang, and its worker's process; what became of it.

        If it has ended since, that is what it gives.
        """
        ...

    def replace(self, worker: int) -> None:
        """Puts a fresh worker in the place of a lost one, under a new number."""
        ...

    def is_growing(self) -> bool:
        """Whether nodes may come for it that are not there yet."""
        ...

    def scale(self, max_workers: int) -> int:
        """Has workers come, or no more of them, for work that can use so many.

        Gives how many of those that are there are too many.
        """
        ...

    def give_back(self, worker: int) -> None:
        """Ends an idle worker, in whose place none comes."""
        ...

    def leaving(self) -> Sequence[int]:
        """Workers that are to take no new call: their nodes are draining or quarantined."""
        ...

    def quarantine(self, node: str) -> None:
        """Gives the workers of a node up, and starts none there any more."""
        ...

    def nodes(self) -> Set[str]:
        """Nodes that can hold a worker: neither draining nor quarantined."""
        ...

    def quarantined(self) -> Set[str]: ...

    def describe(self) -> str:
        """What is there, for messages about waiting."""
        ...


class LocalPool:
    """One worker in this process: the same units and bits, without Ray.

    A call that runs out of memory costs the worker what it holds. A failure of the GPU ends the
    run, since CUDA is unusable in this process, the only one; the same command resumes the run.
    """

    def __init__(self, worker_class: type, task: Any, nonce: str) -> None:
        self._nonce = nonce
        self._calls: deque[tuple[Call, Any]] = deque()
        self.worker: Any = None
        self.turn_to(worker_class, task)

    def turn_to(self, worker_class: type, task: Any) -> None:
        self._worker_class, self._task = worker_class, task
        self.replace(0)

    def gather(self) -> list[dict[str, Any]]:
        return [self.worker.probe(self._nonce)]

    def workers(self) -> Sequence[int]:
        return [0]

    def location(self, worker: int) -> WorkerLocation:
        return WorkerLocation(socket.gethostname(), os.getpid())

    def start(self, call: Call, record: Any) -> None:
        self._calls.append((call, record))

    def wait(self, seconds: float) -> list[Outcome]:
        call, record = self._calls.popleft()
        try:
            value, emitted, usage = self.worker.measured(call.method, call.arguments, record)
        except Exception as error:
            log = traceback.format_exc()
            cause = cause_of_loss(error)
            if cause is Cause.OUT_OF_MEMORY:
                return [Outcome(call, lost=summary(error), cause=cause, log=log)]
            return [Outcome(call, error=error if cause is None else _gpu_lost(error), log=log)]
        return [Outcome(call, value, emitted, usage)]

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        raise AssertionError("a call in this process is waited for, however long it takes")

    def replace(self, worker: int) -> None:
        # the old one's memory is free before the new one takes any
        if self.worker is not None:
            self.worker.release()
            self.worker = None
        self.worker = self._worker_class(self._task)

    def is_growing(self) -> bool:
        return False

    def scale(self, max_workers: int) -> int:
        return 0

    def give_back(self, worker: int) -> None:
        raise AssertionError("the only worker is never too many")

    def leaving(self) -> Sequence[int]:
        return []

    def quarantine(self, node: str) -> None:
        raise AssertionError("there is no other node")

    def nodes(self) -> Set[str]:
        return {socket.gethostname()}

    def quarantined(self) -> Set[str]:
        return frozenset()

    def describe(self) -> str:
        return "one worker in this process"


def _gpu_lost(error: BaseException) -> WorkerError:
    """Error that ends a run in a process whose GPU has failed."""
    lost = WorkerError(
        f"the GPU of this process failed, and CUDA with it: {summary(error)}; what is committed "
        "stays, the same command resumes; if it fails again, look for Xid in the kernel's log, or "
        "select another GPU by CUDA_VISIBLE_DEVICES"
    )
    lost.__cause__ = error
    return lost
