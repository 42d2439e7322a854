"""A cluster with a dashboard, and a working tree that is sent to it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from dashboard import TOKEN, answer, free_port
from drivers import processes_naming, wait_for
from forking import fork_processes

import orchestrator


@pytest.fixture(scope="session")
def dashboard():
    """The address of a dashboard that asks for a token.

    Its head offers no CPU, a second node offers four.
    """
    fork_processes()
    directory = tempfile.mkdtemp(prefix="or-")
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    variables["FORKED"] = "commands"
    variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    # jobs call `python`
    variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = {name: free_port() for name in names}
    head = ["--head", "--num-cpus=0", "--no-monitor", f"--temp-dir={directory}"]
    head += [f"--{name}={port}" for name, port in ports.items()]
    # a directory of its own: Ray unpacks a job's files anew on each node, over those of a driver
    # that runs where two nodes share a directory
    node = [f"--address=127.0.0.1:{ports['port']}", "--num-cpus=4", f"--temp-dir={directory}/n"]
    node += [f"--dashboard-agent-listen-port={free_port()}", "--include-log-monitor=False"]
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    processes = []
    for flags in (head, node):
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *flags]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | variables
        processes.append(
            subprocess.Popen(command, env=environment, start_new_session=True, **silent)
        )
        assert wait_for(lambda: answer(address, TOKEN) == 200)
    yield address
    for process in reversed(processes):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
    assert wait_for(lambda: not processes_naming(directory))
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A working tree with the package, and with what `submit` is not to send."""
    root = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(orchestrator.__file__).parent, root / "orchestrator", ignore=ignored)
    for name in (".venv", ".git", "big"):
        (root / name).mkdir()
        (root / name / "file").write_text("stays here")
    return root
