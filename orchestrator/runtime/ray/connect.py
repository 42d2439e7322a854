"""What a crew needs of Ray: the connection for a run, and a pool of actors for a stage.

All that is imported of Ray's side is imported here, before a run connects: where nodes share a
directory, Ray may be unpacking the very package again as a driver joins.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray

from orchestrator.forecast.rates import largest_memory
from orchestrator.runtime.monitor import Watch
from orchestrator.runtime.ray import cluster as ray_cluster
from orchestrator.runtime.ray.metrics import Metrics
from orchestrator.runtime.ray.pool import RayPool
from orchestrator.runtime.scaling import Bounds
from orchestrator.runtime.worker import Task, Worker


@contextmanager
def connected(address: str | None, watch: Watch) -> Iterator[None]:
    """Joins a cluster or starts one, and counts what happens there; leaves it, or ends it."""
    # half a start leaves processes behind, and a driver that crashes on its way out
    with watch.signals.deferred():
        cluster = ray_cluster.connect(address, watch.note)
    try:
        # a Ray of our own is asked for its metrics by nobody
        with nullcontext() if cluster == "own" else Metrics().following(watch):
            yield
    finally:
        if cluster != "given":
            ray.shutdown()


def devices(threads: int | None) -> tuple[int, float | None]:
    """How many workers the nodes that are there can hold, and the most memory of a GPU of theirs.

    None if there are no GPUs, or some of an unknown type. For a slice of a GPU (MIG) Ray names the
    whole card; the memory that workers report later takes precedence (`foresight`).
    """
    there = ray_cluster.total_room(ray_cluster.worker_share(threads or 1))
    kinds = ray_cluster.gpu_kinds()
    known = [memory for kind in kinds for memory in [largest_memory(kind)] if memory is not None]
    return sum(there.values()), max(known) if known and len(known) == len(kinds) else None


def has_gpus() -> bool:
    """True if the present nodes have GPUs; every worker then gets one."""
    return bool(ray_cluster.gpu_kinds())


def is_this_machine() -> bool:
    """Whether the cluster is the driver's own node and no other, and has no GPU."""
    there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    own = {ray.get_runtime_context().get_node_id()}
    return not has_gpus() and there == own


@contextmanager
def pool(
    worker_class: type[Worker], task: Task, asked: Bounds, most: int, nonce: str, watch: Watch
) -> Iterator[RayPool]:
    """Actors for so much work at most; who grows waits for its first node here."""
    share = ray_cluster.worker_share(task.threads)
    if not asked.is_growing:
        ray_cluster.check_workers(asked.least, share)
    elif not ray_cluster.total_room(share):
        ray_cluster.await_node(task.threads, watch.event)
        share = ray_cluster.worker_share(task.threads)
    with RayPool(
        worker_class,
        task,
        nonce=nonce,
        bounds=asked.for_work(most),
        usable=most,
        share=share,
        threads=task.threads,
        announce=watch.event,
    ) as actors:
        yield actors
