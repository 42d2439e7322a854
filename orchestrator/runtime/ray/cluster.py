"""Connection to a Ray cluster, or start of one on this machine, and its capacity.

Ray's private modules are used here only.
"""

import json
import logging
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from orchestrator import version
from orchestrator.errors import InfeasibleError, StoppedError, UsageError, WorkerError
from orchestrator.readable import counted
from orchestrator.runtime.pool import PATIENCE_SECONDS
from orchestrator.runtime.ray.reasons import first_line

Event = dict[str, Any]
Cluster = Literal["given", "joined", "own"]
"""A cluster to which the process was connected already, that it joined, or that it started."""

UPLOAD_BYTES = min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE)
"""Limit of a job's working directory: the first is that of the dashboard, which receives it."""
CONNECT_SECONDS = 5.0
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""gRPC method that every head answers in milliseconds."""
_NODE_LABEL = "ray.io/node-id"
"""Label of a node with its id, for selectors."""
_NO_TRACEBACKS = "RAY_IGNORE_UNHANDLED_ERRORS"
"""Variable that keeps Ray from printing errors of results that nobody reads."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray passes the options of a job to its driver."""


QUIET = {
    "enable_metrics_collection": False,
    "task_events_report_interval_ms": 0,
    "prestart_worker_first_driver": False,
}
"""Settings of a local Ray: no metrics and no task events, because nobody reads them and they take
time from the workers on a machine with few cores; and no idle processes in advance, because actors
with environment variables of their own do not use them."""


def connect(address: str | None, announce: Callable[[str], None]) -> Cluster:
    """Join a Ray cluster, or start one on this machine. Returns which of them was done.

    A script that has called `ray.init` stays in its cluster. In a Ray job, for which Ray sets
    `RAY_ADDRESS`, no address means the job's cluster. Workers on other nodes get this package
    through the runtime environment.

    Raises:
        UsageError: Nothing answers at the address, or it denies access.
        StoppedError: A local Ray did not start in time, twice.
        WorkerError: Ray cannot be started on this machine.
    """
    if ray.is_initialized():
        return "given"
    # every failed call is reported by the dispatch loop; Ray would print its traceback as well
    os.environ.setdefault(_NO_TRACEBACKS, "1")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        announce("starting a local Ray on this machine")
        _start_local(options, announce)
        return "own"
    announce(f"joining the Ray cluster at {address}")
    _check_answers(address)
    try:
        with _undisturbed():
            ray.init(**options, address=address, runtime_env=_own_package())
    except Exception as error:  # Ray raises plain exceptions too
        ray.shutdown()
        raise UsageError(f"address {address}: cannot be joined: {first_line(error)}") from error
    return "joined"


def _start_local(options: Mapping[str, Any], announce: Callable[[str], None]) -> None:
    """Start a local Ray; tries it again if its processes do not answer in time."""
    for tries in (1, 2):
        try:
            with _undisturbed():
                ray.init(**options, address="local", include_dashboard=False, _system_config=QUIET)
            return
        except Exception as error:  # Ray raises plain exceptions too
            _end_started(error)
            ray.shutdown()
            said = first_line(error)
            if not _is_late(error):
                raise WorkerError(f"Ray cannot be started here: {said}") from error
            if tries == 2:
                raise StoppedError(
                    f"Ray did not start in time, twice: {said}; run the same command again when "
                    "this machine is less busy, or without Ray: --executor local"
                ) from error
        announce(f"starting Ray again: it did not start in time: {said}")


def _is_late(error: Exception) -> bool:
    """Return True if processes of Ray did not answer in time; it says so by plain exceptions."""
    return (
        type(error) is Exception
        or re.search(r"(?i)time[d ]* ?out|deadline", str(error)) is not None
    )


def _end_started(error: Exception) -> None:
    """End the processes of a node whose start failed: `ray.shutdown` knows only complete ones."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, ray._private.node.Node):
            node.kill_all_processes(check_alive=False, allow_graceful=True)
            return


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep Ray from handling SIGTERM, and from printing the errors of its raylets.

    Its Python handler exits through `sys.exit`, and its native handler writes a stack trace and
    aborts the process three seconds later. Errors of raylets are paragraphs on stdout, between our
    results; the dispatch loop reports each loss itself.
    """
    handler_of, listen = ray._private.utils, ray._private.worker
    theirs = handler_of.set_sigterm_handler, listen.listen_error_messages
    handler_of.set_sigterm_handler = lambda handler: None
    listen.listen_error_messages = lambda worker, stopped: None
    try:
        yield
    finally:
        handler_of.set_sigterm_handler, listen.listen_error_messages = theirs
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None and threading.current_thread() is threading.main_thread():
            # installs Python's native handler again
            signal.signal(signal.SIGTERM, handler)


def _own_package() -> dict[str, Any]:
    """Runtime environment that ships this package to nodes.

    A job that was submitted with its own modules has chosen its code, and Ray refuses settings that
    contradict it.
    """
    job = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("runtime_env") or {}
    if "py_modules" in job:
        return {}
    own = {"py_modules": [str(Path(version.__file__).parent)], "excludes": ["__pycache__"]}
    return {name: value for name, value in own.items() if name not in job}


def _check_answers(address: str) -> None:
    """Fail fast: `ray.init` retries for over a minute and ignores signals meanwhile."""
    if address.startswith("ray://"):
        raise UsageError(
            f"address {address}: the Ray client is not supported; run on the cluster with "
            "`ray job submit`, or give the head's own address, host:6379"
        )
    remedy = "give host:port of the head, `auto` on one of its nodes, or no address for a local Ray"
    try:
        where = canonicalize_bootstrap_address(address)
        if where is None:
            return
        host, _, port = where.rpartition(":")
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UsageError(f"address {address}: no Ray cluster answers: {error}; {remedy}") from error
    try:
        with init_grpc_channel(where) as channel:
            channel.unary_unary(_CHECK_ALIVE)(b"", timeout=CONNECT_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise UsageError(
                f"address {address}: the cluster asks for another token than RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH give here; set RAY_AUTH_MODE=token and one of them"
            ) from error
        raise UsageError(
            f"address {address}: something listens there, but no Ray cluster answers: "
            f"{error.code().name}; {remedy}"
        ) from error
    except RayError as error:
        raise UsageError(f"address {address}: cannot be joined: {first_line(error)}") from error


WorkerResources = dict[str, float]
"""Resources of one worker, as options of `ray.remote`."""


def worker_resources(threads: int) -> WorkerResources:
    """One GPU and a CPU per thread; the CPUs only if no node has a GPU."""
    has_gpu = any(node["Resources"].get("GPU", 0) >= 1 for node in _nodes())
    return {"num_gpus": int(has_gpu), "num_cpus": threads}


def gpu_kinds() -> set[str]:
    """GPU types reported by the nodes; "" if a GPU node does not report one."""
    kinds = set()
    for node in _nodes():
        if node["Resources"].get("GPU", 0) >= 1:
            named = [n for n in node["Resources"] if n.startswith("accelerator_type:")]
            kinds |= {name.partition(":")[2] for name in named} or {""}
    return kinds


def total_room(resources: WorkerResources) -> dict[str, int]:
    """Workers that each live node could hold if it were idle, by node id."""
    return _room(resources, {node["NodeID"]: node["Resources"] for node in _nodes()})


def free_room(resources: WorkerResources) -> dict[str, int]:
    """Further workers that each node could hold now, by node id."""
    return _room(resources, ray._private.state.available_resources_per_node())


def _room(resources: WorkerResources, amounts: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    asked = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    held = {}
    for node, there in amounts.items():
        workers = min(int(there.get(name, 0) // each) for name, each in asked.items() if each)
        if workers:
            held[node] = workers
    return held


def check_workers(workers: int, resources: WorkerResources) -> None:
    """Raise InfeasibleError if the present nodes cannot hold so many workers."""
    there = sum(total_room(resources).values())
    if workers <= there:
        return
    nodes = [node["Resources"] for node in _nodes()]
    amounts = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    raise InfeasibleError(
        f"workers: {workers} asked for, each with {_words(resources)}; the cluster has "
        f"{_words(amounts)} on {counted(len(nodes), 'node')}, enough for {there}; "
        "ask for fewer workers or threads, or add nodes; an autoscaler adds nodes with "
        f"--workers {workers}..MAX"
    )


def await_node(threads: int, announce: Callable[[Event], None]) -> None:
    """Wait until there is a node that can hold a worker, with messages about the wait.

    The autoscaler is asked for CPUs only, because the GPU type of its nodes is not known before.
    """
    ref = ray.remote(num_cpus=threads, max_retries=-1)(_nothing).remote()
    try:
        while not ray.wait([ref], timeout=PATIENCE_SECONDS)[0]:
            there = f"{counted(len(_nodes()), 'node')}, none with {threads} CPU for workers"
            announce({"event": "waiting", "for": "a node for the first worker", "there": there})
    except BaseException:
        # never after its end: until Ray has recorded that, a cancellation aborts this process
        ray.cancel(ref)
        raise


def _nothing() -> None:
    """Task without work; only its start matters."""


def node_names() -> dict[str, str]:
    """Names of all nodes so far, by id; a machine may hold several nodes."""
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    return {node: f"{host} ({node[:8]})" for node, host in nodes.items()}


def node_of(actor: Any) -> str | None:
    """Id of an actor's present or last node; None if it was never placed."""
    known = ray._private.state.actors(actor._actor_id.hex())
    return known.get("Address", {}).get("NodeID") or None


def draining_nodes() -> dict[str, float | None]:
    """Ids of the draining nodes, with the deadline in seconds since 1970, if it is known.

    A draining node takes no new work; running work continues until the deadline.
    """
    deadlines = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 or None for node, deadline in deadlines.items()}


def on_node(node: str) -> dict[str, Any]:
    """Options that place a task on one node."""
    return {"label_selector": {_NODE_LABEL: node}}


def on_other_nodes(nodes: Set[str]) -> dict[str, Any]:
    """Options that keep an actor off some nodes."""
    return {"label_selector": {_NODE_LABEL: f"!in({','.join(sorted(nodes))})"}} if nodes else {}


def _nodes() -> list[dict[str, Any]]:
    """Ray's records of the live nodes."""
    return [node for node in ray.nodes() if node["Alive"]]


def sizes_of_upload(directory: Path, excludes: Sequence[str]) -> dict[Path, int]:
    """Bytes of the files that Ray would pack, uncompressed, as a job's working directory."""
    sizes: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root)] = path.stat().st_size

    root = directory.absolute()
    left_out = [_get_excludes(root, [*excludes])]
    _dir_travel(root, left_out, add, include_gitignore=True, logger=logging.getLogger(__name__))
    return sizes


def _words(amounts: dict[str, float]) -> str:
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    shown = [f"{amount:g} {names.get(name, name)}" for name, amount in amounts.items() if amount]
    return " and ".join(shown) or "no CPU"
