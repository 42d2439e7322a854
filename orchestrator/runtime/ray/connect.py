"""Ray's side of a worker group: the connection of a run, and a pool of actors for its stages.

All modules that use Ray are imported here, before a run connects: on nodes that share a directory,
Ray may be unpacking this package again while a driver joins.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import ray

from orchestrator.recipe.execution import Execution
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.ray import cluster as ray_cluster
from orchestrator.runtime.ray.metrics import Metrics
from orchestrator.runtime.ray.pool import RayPool
from orchestrator.runtime.scaling import Bounds
from orchestrator.runtime.worker import Task, Worker


@contextmanager
def connected(address: str | None, monitor: RunMonitor) -> Iterator[None]:
    """Join or start a cluster and export metrics of the run; a local Ray is shut down on exit."""
    # an interrupted start leaves processes behind, and the driver crashes at its exit
    with monitor.signals.deferred():
        cluster = ray_cluster.connect(address, partial(monitor.note, activity=True))
    try:
        # nobody reads the metrics of a local Ray
        with nullcontext() if cluster == "own" else Metrics().following(monitor):
            yield
    finally:
        if cluster != "given":
            ray.shutdown()


def worker_room(execution: Execution) -> int:
    """Number of workers that the present nodes can hold."""
    resources = ray_cluster.worker_resources(execution.threads_per_worker)
    return sum(ray_cluster.total_room(resources).values())


def gpu_kinds() -> set[str]:
    """GPU types of the present nodes as Ray reports them; every worker gets a GPU if there are any.

    Ray names the whole card for a slice of a GPU (MIG).
    """
    return ray_cluster.gpu_kinds()


def is_this_machine() -> bool:
    """True if the cluster is the driver's node only, without a GPU."""
    there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    own = {ray.get_runtime_context().get_node_id()}
    return not gpu_kinds() and there == own


@contextmanager
def pool(
    worker_class: type[Worker],
    task: Task,
    asked: Bounds,
    *,
    most: int,
    nonce: str,
    monitor: RunMonitor,
) -> Iterator[RayPool]:
    """Start at most `most` actors. An autoscaling pool waits here for its first node."""
    resources = ray_cluster.worker_resources(task.threads)
    if not asked.is_growing:
        ray_cluster.check_workers(asked.least, resources)
    elif not ray_cluster.total_room(resources):
        ray_cluster.await_node(task.threads, monitor.event)
        resources = ray_cluster.worker_resources(task.threads)
    with RayPool(
        worker_class,
        task,
        nonce=nonce,
        bounds=asked.for_work(most),
        max_workers=most,
        resources=resources,
        threads=task.threads,
        announce=monitor.event,
    ) as actors:
        yield actors
