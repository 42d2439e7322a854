"""What a worker's actor adds to the worker; it imports nothing that the worker would not."""

from typing import Any

import ray

from orchestrator.device import gpu
from orchestrator.runtime.ray import postmortem


class WorkerActor:
    """A process that is one worker after another, and says where it is and how to look at it.

    What a worker needs takes seconds to import; the next one of the run finds it there.
    """

    def __init__(self) -> None:
        self._log = postmortem.listen()
        self._worker: Any = None

    def become(self, worker_class: type, task: Any, nonce: str) -> dict[str, Any]:
        """Puts a worker of this class in the place of the one before, whose memory is free first.

        Gives its probe, with its node's id, the file that its stderr goes to, and the error message
        if it does not see its GPU.
        """
        if self._worker is not None:
            self._worker.release()
            self._worker = None
        self._worker = worker_class(task)
        where = {"node_id": ray.get_runtime_context().get_node_id(), "log": self._log}
        return {**self._worker.probe(nonce), **where, "unseen": gpu.unseen(ray.get_gpu_ids())}

    def perform(self, method: str, arguments: tuple[Any, ...], *records: Any) -> tuple[Any, Any]:
        """A call's small result with its peak memory, and the chunk that it hands over."""
        value, emitted, usage = self._worker.measured(method, arguments, *records)
        return (value, usage), emitted
