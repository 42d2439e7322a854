"""Start of workers, on Ray or in this process; probes prove that they are alike."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from orchestrator.device.strict import cuda_environment_here
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.readable import counted
from orchestrator.recipe.execution import Execution
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.pool import LocalPool, Pool
from orchestrator.runtime.scaling import Bounds
from orchestrator.runtime.worker import PROBE_PREFIX, Task, Worker
from orchestrator.store.files import atomic


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Workers that are ready, with their common properties."""

    pool: Pool
    size: int
    """Number of workers that exist or may exist, by which models are cut."""
    environment: dict[str, Any]
    """Settings that can change bits, equal for all workers."""
    nodes: tuple[str, ...]
    execution: Execution = field(default_factory=Execution)
    """The requested place and parallelism."""
    most: int = 1
    """Workers that the work can use."""
    bounds: Bounds = field(default_factory=Bounds)
    device_bytes: int | None = None
    """Memory of the smallest GPU of a worker; None without GPUs."""

    def location(self, worker: int) -> dict[str, Any]:
        """Return `node` and `pid` of a worker, for the events of its units."""
        return asdict(self.pool.workers()[worker])

    def cut(self, num_blocks: int, *, blocks: int = 2, group: int = 1) -> tuple[range, ...]:
        """Cut a model into as many shards as requested.

        Args:
            blocks: Maximum number of blocks of a shard if no number of shards is requested.
            group: Blocks that are not separated.
        """
        asked = self.execution.shards
        shards = asked or default_shards(num_blocks, self.size, max(blocks, group))
        return cut_blocks(num_blocks, shards, group)

    def reassigned(self, worker_class: type[Worker], task: Task) -> "WorkerGroup":
        """Give the workers another task of the run, in their processes.

        Raises:
            InfeasibleError, InputError: As `start_workers`.
        """
        self.pool.reassign(worker_class, task)
        return self.gathered()

    def gathered(self) -> "WorkerGroup":
        """Wait for the workers. Returns the group with its actual size and properties."""
        probes = self.pool.gather()
        within = self.bounds.for_work(self.most)
        return replace(
            self,
            size=within.within(self.most) if within.is_growing else len(probes),
            environment=probes[0]["environment"],
            nodes=tuple(sorted({probe["node"] for probe in probes})),
            device_bytes=min(
                filter(None, (probe["device_bytes"] for probe in probes)), default=None
            ),
        )


@contextmanager
def connected(execution: Execution, monitor: RunMonitor) -> Iterator[None]:
    """Join or start a Ray cluster for all stages of a run; leave or end it on exit.

    Without Ray, this process has CUDA's environment meanwhile, because PyTorch reads it when a
    device is first used.

    Raises:
        UsageError: The address does not answer.
    """
    if execution.executor == "local":
        with cuda_environment_here():
            yield
        return
    # Ray takes a second to import, and a local run does not need it
    from orchestrator.runtime.ray import connect

    with connect.connected(execution.address, monitor):
        yield


@contextmanager
def start_workers(
    worker_class: type[Worker],
    task: Task,
    execution: Execution,
    monitor: RunMonitor,
    *,
    most: int,
) -> Iterator[WorkerGroup]:
    """Start and probe workers on the connected cluster, or in this process; end them on exit.

    Args:
        most: Workers that the work can use.

    Raises:
        UsageError: More than one local worker is requested.
        InfeasibleError: The cluster cannot hold so many workers.
        InputError: A node does not see the model or a directory, or runs other versions.
    """
    asked = Bounds.of(execution.workers)
    if execution.executor == "local":
        if asked.least > 1:
            raise UsageError(
                f"workers: {execution.workers} with the local executor, which is one process; "
                "omit --workers, or use --executor ray"
            )
        products = torch.backends.cuda.matmul
        threads, precision = torch.get_num_threads(), products.fp32_precision
        try:
            with _probe_files(task) as nonce:
                pool = LocalPool(worker_class, task, nonce)
                yield WorkerGroup(pool, 1, {}, (), execution).gathered()
        finally:
            # the worker has changed these settings of the caller's process
            torch.set_num_threads(threads)
            products.fp32_precision = precision
        return
    from orchestrator.runtime.ray import connect

    monitor.note("waiting for workers to start", activity=True)
    with (
        _probe_files(task) as nonce,
        connect.pool(
            worker_class, task, asked, most=most, nonce=nonce, monitor=monitor
        ) as ray_pool,
    ):
        try:
            workers = WorkerGroup(ray_pool, 0, {}, (), execution, most, asked).gathered()
            there = len(ray_pool.workers())
            monitor.note(
                f"{counted(there, 'worker')} on {', '.join(workers.nodes)}: "
                f"{workers.environment['device']}"
            )
            yield workers
        finally:
            monitor.dismiss_workers()


@contextmanager
def _probe_files(task: Task) -> Iterator[str]:
    """Create files by which workers prove that they see the driver's directories.

    They exist as long as workers may start; files of a killed driver are removed.
    """
    nonce = uuid.uuid4().hex[:12]
    for directory in task.writes:
        for stale in directory.iterdir() if directory.is_dir() else ():
            if stale.name.startswith(PROBE_PREFIX):
                stale.unlink(missing_ok=True)
    paths = [directory / f"{PROBE_PREFIX}{nonce}" for directory in task.writes]
    try:
        for path in paths:
            with atomic(path) as temporary:
                temporary.touch()
        yield nonce
    finally:
        for path in paths:
            with suppress(OSError, OrchestratorError):
                path.unlink(missing_ok=True)
