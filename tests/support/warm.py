"""Ray workers that serve one run after another, for tests that are not about their start.

A new worker imports torch and transformers, which takes several seconds of a core; a run of a tiny
model takes less than one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def warm_workers() -> Iterator[None]:
    """Keep the workers of each run that are idle at its end for the next run of this process."""
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
