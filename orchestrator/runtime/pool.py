"""Interface of a pool of workers, and the pool that needs no Ray.

`LocalPool` runs calls in this process, `ray.pool.RayPool` in actors. `FixedPool` is the common part
of pools with a fixed set of workers; the simulator and the tests derive theirs from it.
"""

import os
import socket
import traceback
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.errors import WorkerError
from orchestrator.readable import counted
from orchestrator.runtime.calls import Call
from orchestrator.runtime.losses import cause_of_loss, summary
from orchestrator.runtime.policy import Cause
from orchestrator.usage import Usage

PATIENCE_SECONDS = 30.0
"""Interval between messages about a wait."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of a call: a value, an error, or the loss of its worker."""

    call: Call
    value: Any = None
    """Result of the call, a small value."""
    record: Any = None
    """Output chunk, as a value or a reference; None if the call has none."""
    usage: Usage | None = None
    """Peak memory of the call."""
    error: BaseException | None = None
    """Exception of the call; any worker would raise it again."""
    lost: str | None = None
    """Reason for which the worker is lost or unusable; None if it is not."""
    cause: Cause = Cause.DIED
    """Kind of loss, if the worker is lost."""
    log: str = ""
    """Diagnostics of a failure: a traceback, stacks, or the end of the worker's log."""


@dataclass(frozen=True, slots=True)
class WorkerLocation:
    """Node and process of a worker."""

    node: str
    """Name of the node, unique in the pool."""
    pid: int


class NodeView(Protocol):
    """Nodes of a pool, by name."""

    @property
    def is_growing(self) -> bool:
        """True if an autoscaler may add nodes."""
        ...

    def available(self) -> Set[str]:
        """Nodes that can hold a worker: neither draining nor quarantined."""
        ...

    def leaving(self) -> Set[str]:
        """Nodes that get no new call: draining or quarantined."""
        ...

    def quarantined(self) -> Set[str]: ...

    def quarantine(self, node: str) -> None:
        """Exclude a node: its workers are given up, and no worker starts there again."""
        ...

    def describe(self) -> str:
        """Resources and state of the nodes, for messages about a wait."""
        ...


@dataclass
class NodeSet:
    """Nodes that are known by name alone, without a cluster."""

    names: set[str]
    draining: set[str] = field(default_factory=set)
    is_growing: bool = False
    _quarantined: set[str] = field(default_factory=set)

    def available(self) -> Set[str]:
        return self.names - self.leaving()

    def leaving(self) -> Set[str]:
        return self.draining | self._quarantined

    def quarantined(self) -> Set[str]:
        return self._quarantined

    def quarantine(self, node: str) -> None:
        self._quarantined.add(node)

    def describe(self) -> str:
        return f"nodes {', '.join(sorted(self.names))}"


class Pool(Protocol):
    """Equal workers; each executes one call at a time."""

    @property
    def nodes(self) -> NodeView: ...

    def reassign(self, worker_class: type, task: Any) -> None:
        """Give the workers another task; they free the state of the previous one."""
        ...

    def gather(self) -> list[dict[str, Any]]:
        """Wait until enough workers are ready. Returns the probe of each."""
        ...

    def workers(self) -> Mapping[int, WorkerLocation]:
        """Workers that are ready, by number; one that is lost stays until it is replaced."""
        ...

    def start(self, call: Call, record: Any) -> None:
        """Start a call on its idle worker.

        Args:
            record: Input chunk, or a list of them; None if the worker is to read its file.
        """
        ...

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait for calls to end; empty if none ends within `seconds`."""
        ...

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        """End a call that is taken to hang, with its worker's process. Returns its outcome.

        If the call has ended meanwhile, the outcome is its result.
        """
        ...

    def replace(self, worker: int) -> None:
        """Remove a worker and start a new one, which has another number."""
        ...

    def scale(self, max_workers: int) -> int:
        """Adapt the number of workers to work that can use at most `max_workers`.

        Returns the number of ready workers that are surplus.
        """
        ...

    def give_back(self, worker: int) -> None:
        """Remove an idle worker without a replacement."""
        ...


def describe(workers: int, nodes: NodeView) -> str:
    """Number of workers and state of the nodes, for messages about a wait."""
    return f"{counted(workers, 'worker')}, {nodes.describe()}"


class FixedPool:
    """Base of pools whose workers are given: they have no task, never hang and are never surplus.

    Derived classes define `workers`, `start`, `wait` and `replace`.
    """

    def __init__(self, nodes: NodeSet) -> None:
        self.nodes = nodes

    def reassign(self, worker_class: type, task: Any) -> None:
        """Workers without a task have no state to free."""

    def gather(self) -> list[dict[str, Any]]:
        return []

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        raise AssertionError(f"{call.label}: a call of a {type(self).__name__} cannot hang")

    def scale(self, max_workers: int) -> int:
        return 0

    def give_back(self, worker: int) -> None:
        raise AssertionError(f"worker {worker} of a {type(self).__name__} is never surplus")


class LocalPool(FixedPool):
    """One worker in this process; results are those of a Ray run, bit for bit.

    A call that runs out of memory costs the worker its state. A failure of the GPU ends the run,
    because CUDA is unusable in this process afterwards; the same command resumes the run.
    """

    def __init__(self, worker_class: type, task: Any, nonce: str) -> None:
        super().__init__(NodeSet({socket.gethostname()}))
        self._nonce = nonce
        self._calls: deque[tuple[Call, Any]] = deque()
        self.worker: Any = None
        self.reassign(worker_class, task)

    def reassign(self, worker_class: type, task: Any) -> None:
        self._worker_class, self._task = worker_class, task
        self.replace(0)

    def gather(self) -> list[dict[str, Any]]:
        return [self.worker.probe(self._nonce)]

    def workers(self) -> Mapping[int, WorkerLocation]:
        return {0: WorkerLocation(socket.gethostname(), os.getpid())}

    def start(self, call: Call, record: Any) -> None:
        self._calls.append((call, record))

    def wait(self, seconds: float) -> list[Outcome]:
        call, record = self._calls.popleft()
        try:
            value, emitted, usage = self.worker.measured(call.command, record)
        except Exception as error:
            log = traceback.format_exc()
            cause = cause_of_loss(error)
            if cause is Cause.OUT_OF_MEMORY:
                return [Outcome(call, lost=summary(error), cause=cause, log=log)]
            return [Outcome(call, error=error if cause is None else _gpu_lost(error), log=log)]
        return [Outcome(call, value, emitted, usage)]

    def replace(self, worker: int) -> None:
        # the previous worker's memory is freed before the next one allocates
        if self.worker is not None:
            self.worker.release()
            self.worker = None
        self.worker = self._worker_class(self._task)


def _gpu_lost(error: BaseException) -> WorkerError:
    """Error that ends a run in a process whose GPU has failed."""
    lost = WorkerError(
        f"the GPU of this process failed, and CUDA with it: {summary(error)}; committed units "
        "stay, the same command resumes the run; if it fails again, look for Xid in the kernel's "
        "log, or select another GPU with CUDA_VISIBLE_DEVICES"
    )
    lost.__cause__ = error
    return lost
