"""One run on a cluster that grows for it and shrinks again, by Ray's own fake autoscaler."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from drivers import processes_naming, start, wait_for
from pipeline import write_llama, write_text

from orchestrator.device.gpu import PRETENDED

pytestmark = pytest.mark.autoscale

HEAD = "f" * 51 + "00000"
"""The id that the fake provider takes the head to have."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
WORKER = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80_000_000}, "node_config": {}}
IDLE = """
import sys
from orchestrator.cli.main import main
from orchestrator.runtime import scaling
scaling.IDLE_SECONDS = 1.0
sys.exit(main())
"""
LONG = {"epochs": 300, "patience": 10_000, "batches": 4, "learning_rate": 1e-6}


def config(port):
    """A head that holds no worker, and up to two nodes that pretend to have a GPU."""
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.02,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "head_node_id": HEAD,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": WORKER | {"min_workers": 0, "max_workers": 2},
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


class Autoscaling:
    """A head with an autoscaler; who its nodes were, second by second."""

    def __init__(self, directory):
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        file = Path(directory) / "autoscaling.json"
        file.write_text(json.dumps(config(port)))
        fixed = ["--head", "--block", "--num-cpus=0", "--include-dashboard=False"]
        flags = [f"--port={port}", f"--autoscaling-config={file}", f"--temp-dir={directory}"]
        variables = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *fixed, *flags],
            env=os.environ | variables,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.counts = []
        self._client = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._monitor, daemon=True)

    def begin(self):
        from ray._raylet import GcsClient

        def is_there():
            try:
                socket.create_connection(("127.0.0.1", int(self.address.split(":")[1]))).close()
            except OSError:
                return False
            return True

        assert wait_for(is_there)
        self._client = GcsClient(address=self.address)
        assert wait_for(lambda: self.nodes() == 0)
        self._thread.start()

    def nodes(self):
        """Nodes beside the head that are alive; below zero while even that is not there."""
        infos = self._client.get_all_node_info(timeout=10).values()
        return sum(info.state == 0 for info in infos) - 1

    def _monitor(self):
        while not self._ended.wait(0.25):
            count = self.nodes()
            if not self.counts or self.counts[-1] != count:
                self.counts.append(count)

    def end(self):
        self._ended.set()
        self._thread.join()
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(timeout=30)


@pytest.fixture
def cluster():
    directory = tempfile.mkdtemp(prefix="or-")
    cluster = Autoscaling(directory)
    try:
        cluster.begin()
        yield cluster
    finally:
        cluster.end()
        assert wait_for(lambda: not processes_naming(directory))
        shutil.rmtree(directory, ignore_errors=True)


def test_a_run_grows_a_cluster_and_lets_it_shrink(cluster, tmp_path, monkeypatch):
    """From no node to one, where it begins, to two; at the end of a stage back to one.

    The last of three blocks is refined when one of two workers has nothing to do any more: its node
    goes while it is at work. After the run none is left.
    """
    monkeypatch.setenv(PRETENDED, "1")
    llama = write_llama(tmp_path / "dense", blocks=3)
    text = write_text(tmp_path / "text.txt")
    arguments = [str(llama), str(tmp_path / "out"), "--calibration", str(text), "--keep", "0.5"]
    arguments += ["--samples", "6", "--sequence-length", "48", "--refine", "blocks"]
    arguments += ["--method", "svd-llm"]
    for name, value in LONG.items():
        arguments += ["--option", f"refinement.{name}={value}"]
    arguments += ["--address", cluster.address, "--workers", "1..2", "--progress", "json"]
    process = start("-c", IDLE, "compress", *arguments)
    try:
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert wait_for(lambda: cluster.counts[-1] == 0), "nothing is asked for any more"

    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    names = [event["event"] for event in events]
    (first, *later) = [len(event["workers"]) for event in events if event["event"] == "workers"]
    assert first == 1, "it begins as soon as one is there"
    assert later
    assert cluster.counts[:2] == [0, 1], "a node for the first worker"
    assert max(cluster.counts) == 2
    after = cluster.counts[cluster.counts.index(2) :]
    assert "returned" in names
    returned = max(n for n, name in enumerate(names) if name == "returned")
    done = names.index("stage", returned)
    assert events[done]["stage"] == "refine", "given back while the last block was at work"
    assert 1 in after, "the last block's worker stayed"
