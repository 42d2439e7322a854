"""Getting workers, on Ray or in this process: proved to see the same files and be alike."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.cluster.pool import LocalPool, Pool
from orchestrator.cluster.watch import Watch
from orchestrator.cluster.worker import Task, Worker
from orchestrator.errors import InputError, UsageError
from orchestrator.store.files import atomic

DEFAULT_THREADS = 1
"""One thread a worker: on CPUs the most work a second, and bits that do not depend on how many
cores a machine has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How much at once and where: what changes the time a run takes, never its result."""

    executor: str = "ray"
    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    shards: int | None = None


@dataclass(frozen=True, slots=True)
class Crew:
    """Workers that are ready."""

    pool: Pool
    size: int
    environment: dict[str, Any]
    """What can change bits, the same for all of them."""
    nodes: tuple[str, ...]


@contextmanager
def assemble(
    worker_class: type[Worker], task: Task, schedule: Schedule, most: int, watch: Watch
) -> Iterator[Crew]:
    """Starts workers and proves them; ends them, and a Ray that was started here, on the way out.

    Args:
        most: Workers that the work can use.

    Raises:
        UsageError: The address does not answer, or more than one local worker is asked for.
        InfeasibleError: The cluster can never hold so many workers.
        InputError: A node does not see the model or a directory, or runs other versions.
    """
    if schedule.executor == "local":
        if schedule.workers not in (None, 1):
            raise UsageError(
                f"workers: {schedule.workers} with the local executor, which is one process; "
                "leave it out, or use --executor ray"
            )
        threads = torch.get_num_threads()
        try:
            with _probe_files(task) as nonce:
                pool = LocalPool(lambda: worker_class(task))
                probe = pool.worker.probe(nonce)
            yield Crew(pool, 1, probe["environment"], (probe["node"],))
        finally:
            # the worker has set its own number, in what is the caller's process
            torch.set_num_threads(threads)
        return
    with _ray_pool(worker_class, task, schedule, most, watch) as (ray_pool, size):
        with _probe_files(task) as nonce:
            probes = ray_pool.probe(nonce)
        environment = _common([probe["environment"] for probe in probes], probes)
        nodes = tuple(sorted({probe["node"] for probe in probes}))
        watch.note(f"{size} workers on {', '.join(nodes)}: {environment['device']}")
        where = [{"node": probe["node"], "pid": probe["pid"]} for probe in probes]
        watch.event({"event": "workers", "workers": where})
        yield Crew(ray_pool, size, environment, nodes)


@contextmanager
def _ray_pool(
    worker_class: type[Worker], task: Task, schedule: Schedule, most: int, watch: Watch
) -> Iterator[tuple[Any, int]]:
    # Ray takes a second to import, and a run in this process does without it
    import ray

    from orchestrator.cluster.ray_pool import RayPool, check_workers, cluster_shares, connect

    started = connect(schedule.address, watch.note)
    try:
        share, room = cluster_shares(schedule.threads or DEFAULT_THREADS)
        size = schedule.workers or max(1, min(room, most))
        check_workers(size, share, room)
        with RayPool(
            worker_class,
            task,
            workers=min(size, most),
            share=share,
            threads=task.threads,
            announce=watch.event,
        ) as pool:
            yield pool, min(size, most)
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _probe_files(task: Task) -> Iterator[str]:
    """Files that only storage shared with the driver shows, for the time of the probe."""
    nonce = uuid.uuid4().hex[:12]
    paths = [directory / f".probe-{nonce}" for directory in task.writes]
    try:
        for path in paths:
            with atomic(path) as temporary:
                temporary.touch()
        yield nonce
    finally:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _common(environments: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]) -> Any:
    """The environment that all workers share."""
    first = environments[0]
    for environment, probe in zip(environments, probes, strict=True):
        for name, value in environment.items():
            if value != first[name]:
                raise InputError(
                    f"node {probe['node']}: {name} is {value}, on node {probes[0]['node']} it is "
                    f"{first[name]}; all workers of a run must be alike, or its bits would depend "
                    "on who did what"
                )
    return first
