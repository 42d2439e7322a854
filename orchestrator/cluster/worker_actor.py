"""What a worker's actor adds to the worker; it imports nothing that the worker would not."""

from typing import Any

import ray

from orchestrator.cluster import gpu, postmortem


class WorkerActor:
    """A process that is one worker after another, and says where it is and how to look at it.

    What a worker needs takes seconds to import; the next one of the run finds it there.
    """

    def __init__(self) -> None:
        self._log = postmortem.listen()
        self._worker: Any = None

    def become(self, worker_class: type, task: Any, nonce: str) -> dict[str, Any]:
        """Puts a worker of this class in the place of the one before, whose memory is free first.

        Gives what it proves, with its node's id, the file that its stderr goes to, and why it does
        not see the GPU that it was given.
        """
        if self._worker is not None:
            self._worker.let_go()
            self._worker = None
        self._worker = worker_class(task)
        where = {"node_id": ray.get_runtime_context().get_node_id(), "log": self._log}
        return {**self._worker.probe(nonce), **where, "unseen": gpu.unseen(ray.get_gpu_ids())}

    def perform(self, method: str, arguments: tuple[Any, ...], *records: Any) -> tuple[Any, Any]:
        performed: tuple[Any, Any] = self._worker.perform(method, arguments, *records)
        return performed
