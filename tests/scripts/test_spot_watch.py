"""The watcher of spot notices, with a server in the role of EC2's metadata service."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from drivers import wait_for

SCRIPT = Path(__file__).parents[2] / "scripts" / "spot_watch"
NOTICE = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


def moment(seconds):
    """Format a time from now as EC2 does."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


class Metadata(ThreadingHTTPServer):
    """IMDSv2: requires a session token, and forgets tokens on request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.documents = {}
        self.tokens = []
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    def do_PUT(self):
        assert self.path == "/latest/api/token"
        assert 1 <= int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        self.server.tokens.append(f"token-{len(self.server.tokens)}-of-this-session")
        self._answer(200, self.server.tokens[-1])

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] not in self.server.tokens[-1:]:
            return self._answer(401, "")
        self.server.asked.append(self.path)
        document = self.server.documents.get(self.path)
        self._answer(200 if document else 404, document or "")

    def _answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata():
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def monitor(metadata, tmp_path):
    """Start the watcher; `ray` records its calls, and fails as often as requested."""
    (tmp_path / "failures").write_text("0")
    calls = tmp_path / "calls"
    calls.touch()
    ray = tmp_path / "ray"
    ray.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nleft=$(cat {tmp_path}/failures)\n'
        f'[ "$left" = 0 ] || {{ echo $((left - 1)) > {tmp_path}/failures; exit 1; }}\n'
    )
    ray.chmod(0o755)

    @contextmanager
    def monitor(*flags, failures=0):
        (tmp_path / "failures").write_text(str(failures))
        with started(metadata, tmp_path, *flags) as process:
            yield process, lambda: calls.read_text().splitlines()

    return monitor


@contextmanager
def started(metadata, bin_dir, *flags):
    command = [sys.executable, SCRIPT, "--endpoint", metadata.url, "--period", "0.05", *flags]
    environment = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.kill()


def rounds(metadata, count):
    """Return True if the watcher polls for the notice `count` more times."""
    wanted = metadata.asked.count(NOTICE) + count
    return wait_for(lambda: metadata.asked.count(NOTICE) >= wanted)


def test_a_notice_drains_the_node(metadata, monitor):
    """A notice drains the node once, with the remaining time as deadline; then the watcher ends."""
    with monitor() as (process, calls):
        assert rounds(metadata, 3)
        assert calls() == []
        end = moment(100)
        metadata.documents[NOTICE] = f'{{"action": "terminate", "time": "{end}"}}'
        output, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert output == f"draining: EC2: terminate at {end}\n"
    (call,) = calls()
    fixed, _, seconds = call.rpartition(" ")
    assert fixed == (
        "drain-node --reason DRAIN_NODE_REASON_PREEMPTION "
        f"--reason-message EC2: terminate at {end} --deadline-remaining-seconds"
    )
    assert 90 <= int(seconds) <= 100


def test_the_drain_is_repeated_until_it_is_taken(metadata, monitor):
    """A Ray that does not respond, because it is not started yet, is called again."""
    metadata.documents[NOTICE] = f'{{"action": "stop", "time": "{moment(60)}"}}'
    with monitor(failures=2) as (process, calls):
        assert process.wait(timeout=10) == 0
    assert len(calls()) == 3


def test_a_session_that_expires_is_renewed(metadata, monitor):
    """Expired tokens are renewed, since nodes live longer than six hours."""
    with monitor() as (process, _):
        assert rounds(metadata, 1)
        metadata.tokens.append("another-token-that-nobody-was-given")
        assert rounds(metadata, 2)
        assert len(metadata.tokens) == 3
        metadata.documents[NOTICE] = f'{{"action": "terminate", "time": "{moment(60)}"}}'
        assert process.wait(timeout=10) == 0


@pytest.mark.parametrize("flags", [(), ("--rebalance",)])
def test_a_recommendation_is_told_and_followed_if_wanted(flags, metadata, monitor):
    """A recommendation only reports a risk: without the flag the node continues until a notice."""
    time = moment(0)
    metadata.documents[REBALANCE] = f'{{"noticeTime": "{time}"}}'
    with monitor(*flags) as (process, calls):
        if flags:
            assert process.wait(timeout=10) == 0
            assert len(calls()) == 1
            assert "deadline" not in calls()[0]
            return
        assert rounds(metadata, 4)
        assert calls() == []
        metadata.documents[NOTICE] = f'{{"action": "terminate", "time": "{moment(60)}"}}'
        output, _ = process.communicate(timeout=10)
    assert output.count("rebalance recommended") == 1
    assert len(calls()) == 1


def test_a_service_that_is_not_there_does_not_end_the_watch(metadata, monitor):
    """A missing service is polled again, and its later answer counts."""
    with monitor("--endpoint", "http://127.0.0.1:9") as (process, _):
        for _ in range(3):
            assert "refused" in process.stdout.readline()
        assert process.poll() is None


@pytest.mark.chaos
def test_ray_lets_a_drained_node_go(metadata):
    """A real node is released as preempted, with the message of EC2."""
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        node = cluster.add_node(num_cpus=1)
        metadata.documents[NOTICE] = f'{{"action": "terminate", "time": "{moment(100)}"}}'
        flags = [f"--address={cluster.address}", f"--node-id={node.node_id}"]
        with started(metadata, Path(sys.executable).parent, *flags) as process:
            assert process.wait(timeout=60) == 0
        assert wait_for(node.dead_processes)
        nodes = GcsClient(address=cluster.address).get_all_node_info()
        ends = [(info.node_id.hex(), info.death_info) for info in nodes.values()]
        (death,) = [death for name, death in ends if name == node.node_id]
        assert death.reason_message.startswith("EC2: terminate at ")
        assert death.reason == type(death).AUTOSCALER_DRAIN_PREEMPTED
    finally:
        cluster.shutdown()
