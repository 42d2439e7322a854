"""Refusals of a cluster, and the ways into one: each a clear error, or the same bytes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drivers import SMALL, start, wait_for
from pipeline import contents, run, with_tokenizer, write_text

from orchestrator.cli.main import main
from orchestrator.errors import InfeasibleError, InputError, UsageError, WorkerError
from orchestrator.models.checkpoint.weights import Weights, fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.runtime.worker import Task, Worker, check_alike
from orchestrator.store.run import RunDirectory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    return with_tokenizer(checkpoint("llama"), tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def reference(model, text, tmp_path_factory):
    """Files of one process without Ray."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(model, out, text)
    return contents(out)


@pytest.mark.ray
@pytest.mark.parametrize("fields", [{"workers": 9}, {"workers": 3, "threads": 3}])
def test_more_workers_than_the_cluster_can_hold(fields, model, text, tmp_path, ray_address):
    """The message has what is asked for, what is there and what fits; exit code 3."""
    with pytest.raises(InfeasibleError, match=r"has 8 CPU on 1 node, enough for [28]") as e:
        run(model, tmp_path / "out", text, executor="ray", **fields)
    assert e.value.exit_code == 3
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def starts(monkeypatch):
    """Errors of the next starts of a local Ray; each start takes one, or succeeds without any."""
    import ray

    errors = []

    def init(**options):
        if errors:
            raise errors.pop(0)

    for name in ("RAY_ADDRESS", "RAY_IGNORE_UNHANDLED_ERRORS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return errors


def test_addresses_that_lead_nowhere(starts):
    """A closed port, a deaf one, a name, a client's address: exit code 2, within seconds."""
    from orchestrator.runtime.ray.cluster import connect

    deaf, closed = socket.create_server(("", 0)), socket.create_server(("", 0))
    ports = [closed.getsockname()[1], deaf.getsockname()[1]]
    closed.close()
    addresses = [*(f"127.0.0.1:{port}" for port in ports), "nonsense", "ray://head:10001"]
    says = ["no Ray cluster answers", "something listens", "Invalid address", "not supported"]
    for address, expected in zip(addresses, says, strict=True):
        begun = time.monotonic()
        with pytest.raises(UsageError, match=f"^address {address}: .*{expected}"):
            connect(address, lambda text: None)
        assert time.monotonic() - begun < 8
    deaf.close()


def test_the_command_says_which_address_does_not_answer(starts, model, text, tmp_path, capsys):
    """The exit code is 2, and there is one line."""
    arguments = [str(model), str(tmp_path / "out"), "--calibration", str(text), *SMALL]
    assert main(["compress", *arguments, "--address", "127.0.0.1:1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    (line,) = lines
    assert "error: address 127.0.0.1:1: no Ray cluster answers" in line


LATE = "The current node timed out during startup. This could happen because the GCS"


def test_a_local_ray_that_is_late_is_started_again(starts):
    """Ray says so by a plain exception; another error is reported at once. Ray itself prints no
    tracebacks of failed calls."""
    from orchestrator.runtime.ray.cluster import connect

    said = []
    starts.append(Exception(LATE))
    assert connect(None, said.append) == "own"
    assert os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] == "1"
    assert said[1] == f"starting Ray again: it did not start in time: {LATE}"
    starts.extend([ValueError("The object store is too small"), Exception(LATE)])
    with pytest.raises(WorkerError, match="cannot be started here: The object store is too small"):
        connect(None, said.append)
    assert len(starts) == 1


def test_a_local_ray_that_is_late_twice_stops_the_run(starts, model, text, tmp_path, capsys):
    """One line, and the exit code of a run that the same command resumes."""
    starts.extend([Exception(LATE)] * 2)
    arguments = [str(model), str(tmp_path / "out"), "--calibration", str(text), *SMALL]
    assert main(["compress", *arguments, "--executor", "ray"]) == 75
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    (line,) = lines
    assert f"Ray did not start in time, twice: {LATE}; run the same command again" in line
    assert RunDirectory(tmp_path / "out.run").status()["state"] == "stopped"
    assert not (tmp_path / "out").exists()
    assert starts == []


def task(model, run_dir, **fields):
    found = {model: Weights.open(model).fingerprint} | fields.pop("fingerprints", {})
    return Task(run_dir=run_dir, threads=1, pass_key="key", fingerprints=found, **fields)


def worker(task):
    return Worker(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)


def test_a_probe_names_the_node_and_what_it_does_not_see(model, tmp_path):
    """A model that is not there, another model in its place, a directory that is another."""
    here = f"^node {socket.gethostname()}: "
    with pytest.raises(InputError, match=rf"{here}does not see the model: .*nowhere"):
        worker(task(model, tmp_path, fingerprints={tmp_path / "nowhere": "0"})).probe("n")
    with pytest.raises(InputError, match=f"{here}.* must read the same checkpoint"):
        worker(task(model, tmp_path, fingerprints={model: "0" * 64})).probe("n")
    with pytest.raises(InputError, match=f"{here}does not see {tmp_path} as the driver does"):
        worker(task(model, tmp_path, writes=(tmp_path,))).probe("n")
    (tmp_path / ".probe-n").touch()
    assert worker(task(model, tmp_path, writes=(tmp_path,))).probe("n")["pid"] == os.getpid()


def test_workers_that_are_not_alike_are_refused():
    """A node with another version is named, with both versions."""
    first = {"node": "a", "environment": {"torch": "2.13.0", "threads": 1}}
    check_alike({"node": "b", "environment": {"torch": "2.13.0", "threads": 1}}, first)
    with pytest.raises(InputError, match=r"node b: torch is 2.12.1, on node a it is 2.13.0"):
        check_alike({"node": "b", "environment": {"torch": "2.12.1", "threads": 1}}, first)


@pytest.fixture
def blind_node(ray_address, tmp_path):
    """A directory that a second node of the cluster does not see; workers are on both nodes.

    That node runs in a mount namespace of its own, where the directory is empty.
    """
    import ray

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    unshare = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*unshare, f"mount -t tmpfs none {hidden}"], capture_output=True).returncode:
        pytest.skip("needs the right to make mount namespaces")
    node = f"{sys.executable} -m ray.scripts.scripts start --address {ray_address} --num-cpus 1"
    command = f"mount -t tmpfs none {hidden} && exec {node} --block"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # a worker that is forked would see what the server of forks sees
    own = os.environ | {"FORKED": "nodes"}
    process = subprocess.Popen([*unshare, command], env=own, start_new_session=True, **quiet)

    # one worker fits on the first node, the next must go to the second
    class Filler:
        def is_there(self):
            return True

    filler = ray.remote(num_cpus=7)(Filler).remote()
    assert ray.get(filler.is_there.remote())
    assert wait_for(lambda: alive_nodes(ray) == 2)
    yield hidden
    ray.kill(filler)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    assert wait_for(lambda: alive_nodes(ray) == 1)


def alive_nodes(ray):
    return sum(node["Alive"] for node in ray.nodes())


@pytest.mark.ray
def test_a_node_that_does_not_see_a_directory(model, text, tmp_path, blind_node):
    """The run ends before any work, with exit code 4, the node and the path."""
    hidden = Path(shutil.copytree(model, blind_node / "dense"))
    fields = {"executor": "ray", "workers": 2}
    node = rf"^node {socket.gethostname()}: does not see"
    with pytest.raises(InputError, match=f"{node} the model: {hidden}") as raised:
        run(hidden, tmp_path / "a", text, **fields)
    assert raised.value.exit_code == 4
    with pytest.raises(InputError, match=f"{node} {blind_node}/b as the driver does"):
        run(model, blind_node / "b", text, run_dir=str(tmp_path / "b.run"), **fields)
    with pytest.raises(InputError, match=f"{node} {blind_node}/c.run as the driver does"):
        run(model, tmp_path / "c", text, run_dir=str(blind_node / "c.run"), **fields)
    for out in (tmp_path / "a", blind_node / "b", tmp_path / "c"):
        assert not out.exists()


@pytest.mark.ray
def test_inside_a_task(model, text, reference, tmp_path, ray_address):
    """`compress` called where Ray runs already uses that Ray, and asks for its workers there."""
    import ray

    fields = {"keep": 0.5, "samples": 6, "sequence_length": 48, "workers": 2, "shards": 2}
    fields["method"] = "svd-llm"
    fields |= {"model": str(model), "out": str(tmp_path / "out"), "calibration": str(text)}

    def work():
        from orchestrator import Recipe, compress

        return str(compress(Recipe(**fields)).out)

    out = ray.get(ray.remote(num_cpus=1)(work).remote())
    assert contents(Path(out)) == reference


@pytest.mark.ray
def test_the_package_comes_with_the_driver(model, text, reference, tmp_path, ray_address):
    """Nodes run the driver's own copy of the package, whatever they have themselves."""
    import orchestrator

    package = tmp_path / "copy" / "orchestrator"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(orchestrator.__file__).parent, package, ignore=ignored)
    version = package / "version.py"
    version.write_text(version.read_text().replace("__version__ = ", '__version__ = "copy " + '))
    (tmp_path / "empty").mkdir()
    code = """
import json, sys
import ray
from orchestrator import Recipe, compress
fields = json.loads(sys.argv[1])
print(json.dumps(compress(Recipe(**fields)).report["timings"]["environment"]))
"""
    fields = {"keep": 0.5, "samples": 6, "sequence_length": 48, "workers": 1, "shards": 2}
    fields["method"] = "svd-llm"
    fields |= {"model": str(model), "out": str(tmp_path / "out"), "calibration": str(text)}
    fields |= {"address": ray_address}
    paths = [str(package.parent), os.environ["PYTHONPATH"]]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    process = start("-c", code, json.dumps(fields), cwd=tmp_path / "empty", env=environment)
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert json.loads(output)["orchestrator"] == f"copy {orchestrator.__version__}"
    written = contents(tmp_path / "out")
    assert written["model.safetensors"] == reference["model.safetensors"]
