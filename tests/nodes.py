"""Nodes that join the session's Ray and leave it again, each a few processes of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from drivers import wait_for

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
JOIN_SECONDS = 120


class Nodes:
    """Nodes with GPUs that they only pretend to have, so that workers go nowhere else."""

    def __init__(self, address):
        self._address = address
        self._processes = {}

    def fill(self, count):
        """Starts nodes until there are so many; gives their ids."""
        for node in [node for node in self._processes if node not in self._alive()]:
            self._end(self._processes.pop(node))
        while len(self._processes) < count:
            before = self._alive()
            resources = ["--num-cpus", "2", "--num-gpus", "2", "--object-store-memory", "80000000"]
            process = subprocess.Popen(
                [*self._command("start"), "--address", self._address, *resources, "--block"],
                start_new_session=True,
                **QUIET,
            )
            assert wait_for(lambda known=before: self._alive() - known, seconds=JOIN_SECONDS)
            (node,) = self._alive() - before
            self._processes[node] = process
        return sorted(self._processes)

    def drain(self, node, seconds):
        """Tells a node to go, as a spot notice does."""
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        until = ["--deadline-remaining-seconds", str(seconds)]
        where = ["--address", self._address, "--node-id", node]
        subprocess.run([*self._command("drain-node"), *where, *notice, *until], check=True, **QUIET)

    def kill(self, node):
        """Ends all processes of a node at once, without a word to anybody."""
        process = self._processes.pop(node)
        for pid in family(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()

    def close(self):
        """Ends all nodes; when it returns none of them is there for the tests that follow."""
        for process in self._processes.values():
            self._end(process)
        assert wait_for(lambda: not self._alive() & self._processes.keys(), seconds=JOIN_SECONDS)

    def _command(self, name):
        return [sys.executable, "-m", "ray.scripts.scripts", name]

    def _end(self, process):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()

    def _alive(self):
        import ray

        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def family(pid):
    """A process and all that it, or any of those, has started; the eldest first."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found
