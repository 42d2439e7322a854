"""Pools of workers for tests: several in one process, and Ray workers that outlive a run."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from orchestrator.runtime import workers
from orchestrator.runtime.pool import LocalPool, Outcome
from orchestrator.stages.context.pipeline.commands import PassCommand


def crossed(value: Any) -> Any:
    """Copy a value as Ray passes it on: pickled, with arrays in read-only memory.

    Stricter than Ray, whose cloudpickle also takes functions and classes by value.
    """
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(content, buffers=[bytes(each.raw()) for each in buffers])


class SeveralPool(LocalPool):
    """Pool of several workers in this process, one of which is lost at each of some calls.

    Tasks, commands, records and results are copied by `crossed`, so that the workers and the
    driver share no object.
    """

    size, losses, replaces = 3, (), True

    def reassign(self, worker_class, task):
        self._make = lambda: worker_class(crossed(task))
        self._workers = {n: self._make() for n in range(self.size)}
        self._performed = 0  # passes of the pipeline

    def gather(self):
        return [crossed(worker.probe(self._nonce)) for worker in self._workers.values()]

    def workers(self):
        return dict.fromkeys(self._workers, super().workers()[0])

    def wait(self, seconds):
        if not self._calls:
            return []
        call, record = self._calls.pop()
        self._performed += isinstance(call.command, PassCommand)
        worker = self._workers[call.worker]
        try:
            value, emitted = crossed(worker.perform(*crossed((call.command, record))))
        except Exception as error:
            return [Outcome(call, error=error)]
        if isinstance(call.command, PassCommand) and self._performed in self.losses:
            return [Outcome(call, lost="killed")]
        return [Outcome(call, value, emitted)]

    def replace(self, worker):
        self._workers.pop(worker)
        if self.replaces or not self._workers:
            self._workers[worker + 10] = self._make()


def several(monkeypatch, **settings):
    monkeypatch.setattr(workers, "LocalPool", type("Pool", (SeveralPool,), settings))


@contextmanager
def warm_workers() -> Iterator[None]:
    """Keep the Ray workers that are idle at the end of a run for the next run of this process.

    For tests that are not about their start: a new worker imports torch and transformers, which
    takes several seconds of a core; a run of a tiny model takes less than one.
    """
    # Ray takes a second to import, and most tests of a file do not need it
    import ray

    from orchestrator.runtime.ray import connect
    from orchestrator.runtime.ray.pool import RayPool

    stock: list[Any] = []

    class WarmPool(RayPool):
        def _add(self) -> None:
            if not stock or self.nodes.excluded_ids:
                super()._add()
                return
            self._actors[self._count] = stock.pop()
            self._assign(self._count)
            self._count += 1

        def __exit__(self, *exc: object) -> None:
            busy = {call.worker for call, _, _ in self._calls.values()}
            stock.extend(self._actors.pop(worker) for worker in self._probes.keys() - busy)
            super().__exit__(*exc)

    with patch.object(connect, "RayPool", WarmPool):
        yield
    for actor in stock:
        ray.kill(actor)
