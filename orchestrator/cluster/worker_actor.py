"""What a worker's actor adds to the worker; it imports nothing that the worker would not."""

from typing import Any

import ray

from orchestrator.cluster import postmortem


class WorkerActor:
    """A worker in an actor of its own, which also says where it is and how it can be looked at."""

    def __init__(self, worker_class: type, task: Any) -> None:
        self._log = postmortem.listen()
        self._worker = worker_class(task)

    def perform(self, method: str, arguments: tuple[Any, ...], *records: Any) -> tuple[Any, Any]:
        performed: tuple[Any, Any] = self._worker.perform(method, arguments, *records)
        return performed

    def probe(self, nonce: str) -> dict[str, Any]:
        """What the worker proves, with its node's id and the file that its stderr goes to."""
        where = {"node_id": ray.get_runtime_context().get_node_id(), "log": self._log}
        return {**self._worker.probe(nonce), **where}
