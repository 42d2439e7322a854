"""Calls of workers that are Ray actors: start, wait and outcome."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from orchestrator.errors import OrchestratorError
from orchestrator.runtime.calls import Call
from orchestrator.runtime.losses import cause_of_loss, summary
from orchestrator.runtime.policy import Cause
from orchestrator.runtime.pool import Outcome
from orchestrator.runtime.ray import worker_log
from orchestrator.runtime.ray.actors import RayActors, is_node_loss, remote_cause
from orchestrator.runtime.ray.cluster import on_node
from orchestrator.runtime.ray.reasons import reason
from orchestrator.store.chunks import MissingChunk

POSTMORTEM_SECONDS = 10.0
_LOST = (ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError)
_LEAVES_ITS_LOG = (Cause.DIED, Cause.OUT_OF_MEMORY)


class RayPool(RayActors):
    """Workers as Ray actors, each with one GPU, or a share of the CPUs where there is none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._calls: dict[Any, tuple[Call, Any, Any]] = {}
        self._silent: set[str] = set()
        super().__init__(*arguments, **options)

    def start(self, call: Call, record: Any) -> None:
        perform = self._actors[call.worker].perform.options(num_returns=2)
        # Ray resolves references that are arguments themselves, not those in a list
        records = record if isinstance(record, list) else [record]
        value, emitted = perform.remote(call.command, *records)
        self._calls[value] = (call, emitted, record)

    def wait(self, seconds: float) -> list[Outcome]:
        # joining workers are polled even if a call ends at each wait
        waiting = [*self._joining, *self._calls]
        if not waiting:
            time.sleep(seconds)
            return []
        outcomes = []
        for ref in ray.wait(waiting, num_returns=1, timeout=seconds)[0]:
            if ref in self._calls:
                outcomes += self._outcome(ref)
            else:
                worker = self._joining[ref]
                if self._join(ref) is not None:
                    self._announce_new([worker])
        return outcomes

    def _outcome(self, ref: Any) -> list[Outcome]:
        call, emitted, record = self._calls.pop(ref)
        try:
            value, usage = ray.get(ref)
            return [Outcome(call, value, emitted, usage)]
        except RayTaskError as error:
            cause = remote_cause(error)
            if isinstance(cause, ObjectLostError) and record is not None:
                # the chunk was lost with its node before the call began; its file still exists
                self.start(call, None)
                return []
            if (loss := cause_of_loss(cause)) is not None:
                return [Outcome(call, lost=summary(cause), cause=loss, log=str(error))]
            # other exceptions keep Ray's wrapper, whose text is the worker's traceback
            is_ours = isinstance(cause, OrchestratorError | MissingChunk)
            return [Outcome(call, error=cause if is_ours else error, log=str(error))]
        except _LOST as error:
            loss = self._cause_of_loss(call.worker, error)
            log = str(error)
            if loss in _LEAVES_ITS_LOG:
                log += f"\n\nend of its log:\n{self._log(call.worker)}"
            return [Outcome(call, lost=reason(error), cause=loss, log=log)]

    def _cause_of_loss(self, worker: int, error: RayError) -> Cause:
        node = self._probes[worker]["node_id"]
        if isinstance(error, OutOfMemoryError):
            return Cause.OUT_OF_MEMORY
        if self.nodes.is_draining(node) or getattr(error, "preempted", False):
            return Cause.PREEMPTED
        return Cause.NODE_LOST if is_node_loss(error) else Cause.DIED

    def _log(self, worker: int) -> str:
        return self._on_its_node(worker, worker_log.tail, self._probes[worker]["log"])

    def _on_its_node(self, worker: int, function: Callable[..., str], *arguments: Any) -> str:
        """Result of a function on the node of a worker, or the reason for which there is none."""
        node = self._probes[worker]["node_id"]
        if node == ray.get_runtime_context().get_node_id():
            return function(*arguments)
        if node in self._silent:
            return f"node {self.nodes.name(node)} did not answer an earlier query"
        task = ray.remote(num_cpus=0, max_retries=0)(function).options(**on_node(node))
        ref = task.remote(*arguments)
        try:
            said: str = ray.get(ref, timeout=POSTMORTEM_SECONDS)
        except RayError as error:
            if isinstance(error, GetTimeoutError):
                ray.cancel(ref, force=True)
            self._silent.add(node)
            return f"node {self.nodes.name(node)} does not answer: {reason(error)}"
        return said

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        (ref,) = (ref for ref, (each, _, _) in self._calls.items() if each is call)
        if ray.wait([ref], timeout=0)[0]:
            # it ended while other calls were handled
            return self._outcome(ref)
        del self._calls[ref]
        probe = self._probes[call.worker]
        log = self._on_its_node(call.worker, worker_log.end_hung, probe["pid"], probe["log"])
        return [Outcome(call, lost=why, cause=Cause.HUNG, log=log)]
