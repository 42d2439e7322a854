"""Faults that are injected into a running compression: processes, nodes, drivers and files."""

import json
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.nodes import Cluster


@dataclass(slots=True)
class Scene:
    """Running run, as seen by a fault."""

    cluster: Cluster
    out: Path
    rng: random.Random
    driver: subprocess.Popen[str] | None = None
    workers: list[Mapping[str, Any]] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the next driver."""

    def end_driver(self, how: signal.Signals) -> None:
        assert self.driver is not None
        self.driver.send_signal(how)
        self.driver.wait()

    def worker(self) -> int:
        """Return the process of a running worker."""
        there = [each["pid"] for each in self.workers if Path(f"/proc/{each['pid']}").exists()]
        return self.rng.choice(there)

    def node(self) -> str:
        return self.rng.choice(self.cluster.nodes.there())


def kill_worker(scene: Scene) -> None:
    os.kill(scene.worker(), signal.SIGKILL)


def stop_worker(scene: Scene) -> None:
    """Let a worker hang until its deadline."""
    os.kill(scene.worker(), signal.SIGSTOP)


def starve_worker(scene: Scene) -> None:
    """Limit a worker to the memory that it has mapped."""
    worker = scene.worker()
    pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.prlimit(worker, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def kill_node(scene: Scene) -> None:
    scene.cluster.nodes.kill(scene.node())
    scene.cluster.nodes.fill(1)


def drain_node(scene: Scene) -> None:
    scene.cluster.nodes.drain(scene.node(), seconds=30)
    scene.cluster.nodes.fill(1)


def terminate_node(scene: Scene) -> None:
    scene.cluster.nodes.terminate(scene.node())
    scene.cluster.nodes.fill(1)


def kill_driver(scene: Scene) -> None:
    scene.end_driver(signal.SIGKILL)


def stop_driver(scene: Scene) -> None:
    scene.end_driver(signal.SIGTERM)


def fail_calls(scene: Scene) -> None:
    """Let some calls of the next driver be lost, and some answers of others."""
    scene.end_driver(signal.SIGTERM)
    chances = {"req_failure_prob": 25, "resp_failure_prob": 25, "in_flight_failure_prob": 0}
    failing = {"CoreWorkerService.grpc_client.PushTask": {"num_failures": 3} | chances}
    scene.variables["RAY_testing_rpc_failure"] = json.dumps(failing)


def replace_cluster(scene: Scene) -> None:
    """Replace the cluster together with the driver's machine; the new one has another number of
    nodes."""
    scene.end_driver(signal.SIGKILL)
    scene.cluster.replace(scene.rng.choice([1, 3]))


def damage_unit(scene: Scene) -> None:
    """Change a byte of a committed unit, for the next driver to find."""
    scene.end_driver(signal.SIGKILL)
    files = sorted((Path(f"{scene.out}.run") / "units").rglob("*.safetensors"))
    file = scene.rng.choice(files)
    content = bytearray(file.read_bytes())
    content[scene.rng.randrange(len(content))] ^= 1
    file.write_bytes(content)


def lose_chunks(scene: Scene) -> None:
    """Remove boundary chunks while they are needed."""
    for chunk in sorted((Path(f"{scene.out}.run") / "chunks").rglob("*")):
        if chunk.is_file() and scene.rng.random() < 0.5:
            chunk.unlink(missing_ok=True)


KINDS: Mapping[str, Callable[[Scene], None]] = {
    "worker killed": kill_worker,
    "worker hangs": stop_worker,
    "worker out of memory": starve_worker,
    "node killed": kill_node,
    "node drained": drain_node,
    "node terminated": terminate_node,
    "driver killed": kill_driver,
    "driver stopped": stop_driver,
    "calls fail": fail_calls,
    "cluster replaced": replace_cluster,
    "unit damaged": damage_unit,
    "chunks lost": lose_chunks,
}
