"""A Ray of several nodes on this machine, whose nodes are a few processes each, to be ended."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from benchmarks.watching import family

START_SECONDS = 120.0
LEAVE_SECONDS = 60.0


class Nodes:
    """A head that holds no worker, and nodes of two GPUs each that they only pretend to have.

    This process joins it to see who is there. Use as a context manager; leaving it ends all that
    was started, by the ids of its processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._directory = ""
        self._head: subprocess.Popen[bytes] | None = None
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def __enter__(self) -> "Nodes":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM)

    def _start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="or-")
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        flags = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=False"]
        self._head = _ray("start", *flags, f"--temp-dir={self._directory}", "--block")
        until(lambda: _listens(port), START_SECONDS, "the head to listen")
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        self.fill(self._count)

    def _end(self, how: signal.Signals) -> None:
        ray.shutdown()
        processes = [*self._nodes.values(), *([self._head] if self._head else [])]
        for process in processes:
            for pid in family(process.pid) if how is signal.SIGKILL else [process.pid]:
                _signal(pid, how)
        for process in processes:
            process.wait()
        self._nodes, self._head = {}, None
        shutil.rmtree(self._directory, ignore_errors=True)

    def renew(self, count: int) -> None:
        """Kills the whole cluster and starts another one, with so many nodes."""
        self._end(signal.SIGKILL)
        self._count = count
        self._start()

    def fill(self, count: int) -> None:
        """Starts nodes until there are so many."""
        gone = [node for node in self._nodes if node not in self._alive()]
        for node in gone:
            process = self._nodes.pop(node)
            _signal(process.pid, signal.SIGTERM)
            process.wait()
        while len(self._nodes) < count:
            before = self._alive()
            amounts = ["--num-cpus=2", "--num-gpus=2", "--object-store-memory=80000000"]
            process = _ray("start", f"--address={self.address}", *amounts, "--block")
            until(lambda known=before: self._alive() - known, START_SECONDS, "a node to join")
            (node,) = self._alive() - before
            self._nodes[node] = process

    def there(self) -> list[str]:
        """The nodes that are alive, beside the head."""
        return sorted(self._nodes.keys() & self._alive())

    def kill(self, node: str) -> None:
        """Ends all processes of a node at once, without a word to anybody."""
        process = self._nodes.pop(node)
        for pid in family(process.pid):
            _signal(pid, signal.SIGKILL)
        process.wait()

    def terminate(self, node: str) -> None:
        """Tells a node's `ray start --block` to end, upon which it drains itself."""
        _signal(self._nodes[node].pid, signal.SIGTERM)

    def drain(self, node: str, seconds: int) -> None:
        """Tells the cluster that a node goes, as a spot notice does."""
        why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice"]
        where = [f"--address={self.address}", f"--node-id={node}"]
        drained = _ray("drain-node", *where, *why, f"--deadline-remaining-seconds={seconds}")
        if drained.wait() != 0:
            raise RuntimeError(f"node {node} cannot be drained: exit code {drained.returncode}")

    def left_behind(self) -> dict[str, Any]:
        """What of a run is still there, once it had time to go: actors, groups, taken GPUs."""

        def found() -> dict[str, Any]:
            actors = ray._private.state.actors().values()
            alive = [actor["ActorID"] for actor in actors if actor["State"] != "DEAD"]
            groups = ray.util.placement_group_table().values()
            held = [group["placement_group_id"] for group in groups if group["state"] != "REMOVED"]
            there = ray.cluster_resources().get("GPU", 0)
            taken = there - ray.available_resources().get("GPU", 0)
            named = {"actors": alive, "placement_groups": held, "gpus": taken}
            return {name: value for name, value in named.items() if value}

        end = time.monotonic() + LEAVE_SECONDS
        while (left := found()) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Waits for a condition to come true.

    Raises:
        TimeoutError: It did not in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def _ray(command: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", command, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
