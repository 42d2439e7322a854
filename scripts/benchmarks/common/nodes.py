"""Ray nodes on this machine, each a few processes, to be drained and killed."""

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
from benchmarks.common.watching import family

from orchestrator.device.gpu import PRETENDED

START_SECONDS = 120.0
LEAVE_SECONDS = 60.0


class Nodes:
    """Nodes with two declared GPUs each, so that workers are placed only there.

    They join the cluster of this process, which also starts its drivers.
    """

    def __init__(self, address: str) -> None:
        os.environ[PRETENDED] = "1"
        self.address = address
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._leaving: set[str] = set()

    def fill(self, count: int) -> list[str]:
        """Start nodes until `count` are alive and not draining; returns their ids, in order."""
        for node in self._processes.keys() - self._alive():
            _end(self._processes.pop(node))
        while len(self.there()) < count:
            before = self._alive()
            amounts = ["--num-cpus=2", "--num-gpus=2", "--object-store-memory=80000000"]
            # the first node's log monitor reads the files of all nodes of this machine
            amounts.append("--include-log-monitor=False")
            process = ray_command("start", f"--address={self.address}", *amounts, "--block")
            until(lambda known=before: self._alive() - known, START_SECONDS, "a node to join")
            (node,) = self._alive() - before
            self._processes[node] = process
        return self.there()

    def there(self) -> list[str]:
        """Return the nodes that are alive and not draining, in order."""
        return sorted(self._processes.keys() & self._alive() - self._leaving)

    def kill(self, node: str) -> None:
        """Kill all processes of a node at once, without notice."""
        kill_family(self._processes.pop(node))

    def terminate(self, node: str) -> None:
        """Send SIGTERM to a node's `ray start --block`, which then drains the node."""
        self._leaving.add(node)
        _signal(self._processes[node].pid, signal.SIGTERM)

    def drain(self, node: str, seconds: int) -> None:
        """Announce to the cluster that a node will end, like a spot notice."""
        self._leaving.add(node)
        why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice"]
        where = [f"--address={self.address}", f"--node-id={node}"]
        until_then = f"--deadline-remaining-seconds={seconds}"
        drained = ray_command("drain-node", *where, *why, until_then)
        if drained.wait() != 0:
            raise RuntimeError(f"node {node} cannot be drained: exit code {drained.returncode}")

    def close(self) -> None:
        """End all nodes; returns after the last one has ended."""
        for process in self._processes.values():
            _end(process)
        gone = self._processes.keys()
        until(lambda: not self._alive() & gone, START_SECONDS, "nodes to be gone")
        self._processes = {}

    def kill_all(self) -> None:
        for process in self._processes.values():
            kill_family(process)
        self._processes = {}

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class Cluster:
    """Cluster of a head without workers and some nodes, all on this machine; this process joins it.

    Used as a context manager, which ends all started processes by their ids.
    """

    nodes: Nodes

    def __init__(self, nodes: int) -> None:
        self._count = nodes

    def __enter__(self) -> "Cluster":
        self._start(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.nodes.close()
        ray.shutdown()
        _end(self._head)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, nodes: int) -> None:
        self._directory = tempfile.mkdtemp(prefix="or-")
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        flags = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=False"]
        flags.append("--no-monitor")  # of an autoscaler
        self._head = ray_command("start", *flags, f"--temp-dir={self._directory}", "--block")
        until(lambda: _listens(port), START_SECONDS, "the head to listen")
        self.nodes = Nodes(f"127.0.0.1:{port}")
        ray.init(address=self.nodes.address, log_to_driver=False, logging_level="ERROR")
        self.nodes.fill(nodes)

    def replace(self, nodes: int) -> None:
        """Kill the whole cluster and start another one with this number of nodes."""
        ray.shutdown()
        self.nodes.kill_all()
        kill_family(self._head)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._start(nodes)

    def left_behind(self) -> dict[str, Any]:
        """Return leftovers of a run after some time: actors, placement groups, GPUs in use."""

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


def until(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: The condition was not true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def ray_command(command: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a Ray command as a silent process in its own session."""
    return subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", command, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants, without notice."""
    for pid in family(process.pid):
        _signal(pid, signal.SIGKILL)
    process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
