"""Joining a Ray cluster, or starting one in this machine, and what it can hold.

This module and `ray_pool` hold everything that Ray does not promise to keep.
"""

import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from orchestrator import version
from orchestrator.errors import InfeasibleError, UsageError, WorkerError
from orchestrator.runtime.pool import PATIENCE_SECONDS

Event = dict[str, Any]
Cluster = Literal["given", "joined", "own"]
"""One that the process was connected to already, that it has joined, or that it has started."""

CONNECT_SECONDS = 5.0
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A call that every head answers in milliseconds."""
_NODE_LABEL = "ray.io/node-id"
"""What Ray calls each node by, for selectors."""
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray gives a job's driver what the job was submitted with."""


QUIET = {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}
"""Settings of a Ray of our own, which nobody looks at: no metrics, no journal of its tasks. Where
workers and Ray share few cores, it is the workers' time that they take."""


def connect(address: str | None, announce: Callable[[str], None]) -> Cluster:
    """Joins a Ray cluster, or starts one in this machine; says which it is now connected to.

    Inside a script that has called `ray.init` that cluster is used. Inside a Ray job, where Ray
    names the cluster in `RAY_ADDRESS`, no address means that cluster. Workers on other nodes get
    this very package through the runtime environment.

    Raises:
        UsageError: Nothing answers at the address, or it does not let us in.
        WorkerError: Ray does not start on this machine.
    """
    if ray.is_initialized():
        return "given"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        announce("starting a Ray of its own on this machine")
        options |= {"address": "local", "include_dashboard": False, "_system_config": QUIET}
    else:
        announce(f"joining the Ray cluster at {address}")
        _check_answers(address)
        options |= {"address": address, "runtime_env": _own_package()}
    try:
        with _keeping_handlers():
            ray.init(**options)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        ray.shutdown()
        if address == "local":
            raise WorkerError(f"Ray cannot be started here: {first_line(error)}") from error
        raise UsageError(f"address {address}: cannot be joined: {first_line(error)}") from error
    return "own" if address == "local" else "joined"


@contextmanager
def _keeping_handlers() -> Iterator[None]:
    """Keeps Ray from taking SIGTERM: its Python handler leaves through `sys.exit`, and below that
    a native one writes a stack trace and aborts the process three seconds later.
    """
    theirs = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None and threading.current_thread() is threading.main_thread():
            # installs Python's native handler again
            signal.signal(signal.SIGTERM, handler)


def _own_package() -> dict[str, Any]:
    """A runtime environment that brings this package to nodes that need not have it.

    A job that was submitted with modules of its own has chosen its code, and Ray refuses what
    would contradict it.
    """
    job = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("runtime_env") or {}
    if "py_modules" in job:
        return {}
    own = {"py_modules": [str(Path(version.__file__).parent)], "excludes": ["__pycache__"]}
    return {name: value for name, value in own.items() if name not in job}


def _check_answers(address: str) -> None:
    """Fails in seconds where Ray would try for a minute or more, deaf to signals."""
    if address.startswith("ray://"):
        raise UsageError(
            f"address {address}: the Ray client is not supported; run on the cluster with "
            "`ray job submit`, or give the head's own address, host:6379"
        )
    remedy = "give host:port of the head, `auto` on a node of it, or nothing for a Ray of its own"
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


Share = dict[str, float]
"""What one worker asks for, in the words of `ray.remote`."""


def worker_share(threads: int) -> Share:
    """One GPU and its threads' CPUs; the CPUs alone where no node has a GPU."""
    has_gpu = any(node["Resources"].get("GPU", 0) >= 1 for node in _nodes())
    return {"num_gpus": int(has_gpu), "num_cpus": threads}


def gpu_kinds() -> set[str]:
    """The kinds of the GPUs that nodes say they have; of some that do not say it, an empty name."""
    kinds = set()
    for node in _nodes():
        if node["Resources"].get("GPU", 0) >= 1:
            named = [n for n in node["Resources"] if n.startswith("accelerator_type:")]
            kinds |= {name.partition(":")[2] for name in named} or {""}
    return kinds


def total_room(share: Share) -> dict[str, int]:
    """How many workers each node that is alive could hold, were it idle; by its id."""
    return _room(share, {node["NodeID"]: node["Resources"] for node in _nodes()})


def free_room(share: Share) -> dict[str, int]:
    """How many more workers each node could hold now; by its id."""
    return _room(share, ray._private.state.available_resources_per_node())


def _room(share: Share, amounts: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    asked = {"CPU": share["num_cpus"], "GPU": share["num_gpus"]}
    held = {}
    for node, there in amounts.items():
        workers = min(int(there.get(name, 0) // each) for name, each in asked.items() if each)
        if workers:
            held[node] = workers
    return held


def check_workers(workers: int, share: Share) -> None:
    """Raises InfeasibleError when the nodes that are there cannot hold so many workers."""
    there = sum(total_room(share).values())
    if workers <= there:
        return
    nodes = [node["Resources"] for node in _nodes()]
    amounts = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    raise InfeasibleError(
        f"workers: {workers} asked for, each with {_words(share)}; the cluster has "
        f"{_words(amounts)} on {len(nodes)} nodes, enough for {there}; "
        "ask for fewer workers or threads, or add nodes; an autoscaler is asked for more with "
        f"--workers {workers}..MAX"
    )


def await_node(threads: int, announce: Callable[[Event], None]) -> None:
    """Waits, aloud, until a node has come that can hold a worker.

    What it asks an autoscaler for is CPUs alone: which GPUs there will be is not known before.
    """
    ref = ray.remote(num_cpus=threads, max_retries=-1)(_nothing).remote()
    try:
        while not ray.wait([ref], timeout=PATIENCE_SECONDS)[0]:
            there = f"{len(_nodes())} nodes, none with {threads} CPU for workers"
            announce({"event": "waiting", "for": "a node for the first worker", "there": there})
    finally:
        ray.cancel(ref)


def _nothing() -> None:
    """A task's work whose start is all that is wanted."""


def node_names() -> dict[str, str]:
    """The names of all nodes that were ever there, by id; machines may hold several nodes."""
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    return {node: f"{host} ({node[:8]})" for node, host in nodes.items()}


def node_of(actor: Any) -> str | None:
    """The id of the node that an actor is on, or was; nothing if it never came to one."""
    known = ray._private.state.actors(actor._actor_id.hex())
    return known.get("Address", {}).get("NodeID") or None


def draining_nodes() -> dict[str, float | None]:
    """Ids of the nodes that were told to go, and when they do: seconds since 1970, if it is known.

    A node takes no new work from then on; what runs there goes on until it goes.
    """
    deadlines = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 or None for node, deadline in deadlines.items()}


def on_node(node: str) -> dict[str, Any]:
    """The options that have a task run on one node."""
    return {"label_selector": {_NODE_LABEL: node}}


def on_other_nodes(nodes: Set[str]) -> dict[str, Any]:
    """The options that keep an actor off some nodes."""
    return {"label_selector": {_NODE_LABEL: f"!in({','.join(sorted(nodes))})"}} if nodes else {}


def _nodes() -> list[dict[str, Any]]:
    """What Ray says of each node that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def first_line(error: BaseException) -> str:
    """What an error of Ray says first: usually what is wrong."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What an error of Ray says last, after a traceback or the actor's particulars: usually why."""
    return shorten(_lines(error)[-1], 300, placeholder=" ...")


def _lines(error: BaseException) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return plain.strip().splitlines() or [type(error).__name__]


def _words(amounts: dict[str, float]) -> str:
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    shown = [f"{amount:g} {names.get(name, name)}" for name, amount in amounts.items() if amount]
    return " and ".join(shown) or "no CPU"
