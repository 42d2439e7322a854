"""Actor that runs a worker; it imports no module that the worker would not import."""

from typing import Any

import ray

from orchestrator.device import gpu
from orchestrator.runtime.calls import Command
from orchestrator.runtime.ray import worker_log


class WorkerActor:
    """Process that runs one worker after another, and reports its node and log file.

    The imports of a worker take seconds; the next worker of the run finds them done.
    """

    def __init__(self) -> None:
        self._log = worker_log.listen()
        self._worker: Any = None

    def become(self, worker_class: type, task: Any, nonce: str) -> dict[str, Any]:
        """Replace the worker by one of this class; the memory of the previous one is freed first.

        Returns its probe, with the id of its node, the file of its stderr, and the error message if
        it does not see its GPU.
        """
        if self._worker is not None:
            self._worker.release()
            self._worker = None
        self._worker = worker_class(task)
        where = {"node_id": ray.get_runtime_context().get_node_id(), "log": self._log}
        return {**self._worker.probe(nonce), **where, "unseen": gpu.unseen(ray.get_gpu_ids())}

    def perform(self, command: Command, *records: Any) -> tuple[Any, Any]:
        """Execute a command. Returns its result with its peak memory, and the output chunk."""
        value, emitted, usage = self._worker.measured(command, *records)
        return (value, usage), emitted
