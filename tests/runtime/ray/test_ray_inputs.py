"""What a cluster can refuse, and the ways into one: each a clear error, or the same bytes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drivers import SMALL, start, wait_for
from pipeline import contents, run, with_tokenizer, write_text

from orchestrator.errors import InfeasibleError, InputError, WorkerError
from orchestrator.models.checkpoint.output import MARKER_FILE
from orchestrator.models.checkpoint.weights import Weights, fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.runtime.scaling import Bounds
from orchestrator.runtime.worker import Task, Worker, check_alike
from orchestrator.usage import Usage


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    return with_tokenizer(checkpoint("llama"), tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def reference(model, text, tmp_path_factory):
    """What one process writes without Ray."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(model, out, text)
    return contents(out)


@pytest.mark.ray
@pytest.mark.parametrize("fields", [{"workers": 9}, {"workers": 3, "threads": 3}])
def test_more_workers_than_the_cluster_can_hold(fields, model, text, tmp_path, ray_address):
    """What is asked for, what is there and what fits are said; exit code 3."""
    with pytest.raises(InfeasibleError, match=r"has 8 CPU on 1 nodes, enough for [28]") as e:
        run(model, tmp_path / "out", text, executor="ray", **fields)
    assert e.value.exit_code == 3
    assert not (tmp_path / "out" / "config.json").exists()


def test_addresses_that_lead_nowhere():
    """A closed port, a deaf one, a name, a client's address: exit code 2, within seconds."""
    deaf, closed = socket.create_server(("", 0)), socket.create_server(("", 0))
    ports = [closed.getsockname()[1], deaf.getsockname()[1]]
    closed.close()
    code = """
import sys, time
from orchestrator.runtime.ray.cluster import connect
from orchestrator.errors import UsageError
for address in sys.argv[1:]:
    begun = time.monotonic()
    try:
        connect(address, lambda text: None)
    except UsageError as error:
        print(f"{time.monotonic() - begun:.1f} {error}")
"""
    addresses = [*(f"127.0.0.1:{port}" for port in ports), "nonsense", "ray://head:10001"]
    process = start("-c", code, *addresses)
    output, error = process.communicate()
    deaf.close()
    assert process.returncode == 0, error
    says = ["no Ray cluster answers", "something listens", "Invalid address", "not supported"]
    for line, address, expected in zip(output.splitlines(), addresses, says, strict=True):
        seconds, _, message = line.partition(" ")
        assert message.startswith(f"address {address}: ")
        assert expected in message
        assert float(seconds) < 8


def test_the_command_says_which_address_does_not_answer(model, text, tmp_path):
    """The exit code is 2, and there is one line."""
    arguments = [str(model), str(tmp_path / "out"), "--calibration", str(text), *SMALL]
    process = start("-m", "orchestrator", "compress", *arguments, "--address", "127.0.0.1:1")
    _, error = process.communicate()
    assert process.returncode == 2
    assert "error: address 127.0.0.1:1: no Ray cluster answers" in error
    assert "Traceback" not in error


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
    process = subprocess.Popen([*unshare, command], start_new_session=True, **quiet)

    # one worker fits on the first node, the next must go to the second
    class Filler:
        def is_there(self):
            return True

    filler = ray.remote(num_cpus=7)(Filler).remote()
    assert ray.get(filler.is_there.remote())
    assert wait_for(lambda: alive_nodes(ray) == 2, seconds=120)
    yield hidden
    ray.kill(filler)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    assert wait_for(lambda: alive_nodes(ray) == 1, seconds=120)


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
        assert [path.name for path in out.iterdir()] == [MARKER_FILE]


@pytest.mark.ray
def test_inside_a_task(model, text, reference, tmp_path, ray_address):
    """`compress` called where Ray runs already uses that Ray, and asks for its workers there."""
    import ray

    fields = {"keep": 0.5, "samples": 6, "sequence_length": 48, "workers": 2, "shards": 2}
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
    fields |= {"model": str(model), "out": str(tmp_path / "out"), "calibration": str(text)}
    fields |= {"address": ray_address}
    environment = {"PYTHONPATH": str(package.parent)}
    process = start("-c", code, json.dumps(fields), cwd=tmp_path / "empty", env=environment)
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert json.loads(output)["orchestrator"] == f"copy {orchestrator.__version__}"
    written = contents(tmp_path / "out")
    assert written["model.safetensors"] == reference["model.safetensors"]


UNASKED = Bounds()


@pytest.fixture
def make_pool(ray_address):
    """Makes pools of workers that need no model."""
    from orchestrator.runtime.ray.pool import RayPool

    class Plain:
        def __init__(self, task):
            self.other = task
            if task == "broken":
                raise ValueError("no such thing")

        def release(self):
            Path(self.other).unlink(missing_ok=True)

        def probe(self, nonce):
            environment = {"torch": "2.12.1" if os.path.exists(self.other) else "2.13.0"}
            return {"environment": environment, "node": "here", "pid": os.getpid()}

        def measured(self, command, record):
            value = None if record is None else int(record["x"].sum())
            return value, None, Usage(host=1)

    def make(task, bounds=UNASKED, max_workers=1, cpus=1, announce=lambda event: None):
        share = {"num_cpus": cpus, "num_gpus": 0}
        options = {"nonce": "n", "share": share, "threads": 1, "announce": announce}
        return RayPool(Plain, task, bounds=bounds, max_workers=max_workers, **options)

    return make


@pytest.mark.ray
def test_workers_turn_to_another_task_where_they_are(make_pool, tmp_path):
    """The same processes under the same numbers, told of once; each lets the task before go first,
    and one that has died since is replaced. A task that none can take up is an error."""
    events, first = [], tmp_path / "first"
    with make_pool(str(first), Bounds(2, 2), max_workers=2, announce=events.append) as pool:
        first.touch()
        pids = [probe["pid"] for probe in pool.gather()]
        assert {probe["environment"]["torch"] for probe in pool._probes.values()} == {"2.12.1"}
        kept, lost = pool.workers()
        os.kill(pool.workers()[lost].pid, signal.SIGKILL)
        pool.reassign(pool._worker_class, "fine")
        again = pool.gather()
        assert {probe["environment"]["torch"] for probe in again} == {"2.13.0"}
        assert not first.exists()
        assert kept in pool.workers()
        assert lost not in pool.workers()
        assert pool.workers()[kept].pid in pids
        told = [
            location["pid"] for e in events if e["event"] == "workers" for location in e["workers"]
        ]
        assert sorted(told) == sorted({*pids, *(probe["pid"] for probe in again)})
        assert [e["event"] for e in events if e["event"] != "workers"] == ["retired"]
        pool.reassign(pool._worker_class, "broken")
        with pytest.raises(WorkerError, match="a worker cannot start: ValueError: no such thing"):
            pool.gather()


@pytest.mark.ray
def test_a_worker_that_cannot_start_is_an_error(make_pool):
    """What its constructor raised is said at once, in one line."""
    with make_pool("broken") as pool, pytest.raises(WorkerError) as raised:
        pool.gather()
    assert str(raised.value) == "a worker cannot start: ValueError: no such thing"


@pytest.fixture
def half_taken():
    """Half of the cluster's eight CPUs are at something else."""
    import ray

    class Other:
        def is_there(self):
            return True

    other = ray.remote(num_cpus=4)(Other).remote()
    ray.get(other.is_there.remote())
    yield
    ray.kill(other)


@pytest.mark.ray
def test_workers_without_room_are_not_waited_for(make_pool):
    """The run begins with those that fit; those that do not are no workers until they do."""
    with make_pool("fine", Bounds(1, 3, is_growing=True), max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == 2
        assert len(pool._actors) == 3
        first, second = pool.workers()
        pool.replace(first)
        assert list(pool.workers()) == [second]
        assert wait_for(lambda: not pool.wait(0.1) and len(pool.workers()) == 2)


@pytest.mark.ray
def test_the_room_there_is_is_taken_and_kept(make_pool):
    """Unasked no more actors are there than fit; they stay, since others could not be asked for."""
    with make_pool("fine", max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == len(pool._actors) == 2
        assert pool.scale(9) == pool.scale(1) == 0
        assert len(pool._actors) == 2


@pytest.mark.ray
def test_what_others_hold_is_no_room(make_pool, half_taken):
    """No actor is asked for that would wait for somebody else's end, or call for a node."""
    with make_pool("fine", max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == 1
        assert wait_for(lambda: not pool.wait(0.1) and pool.nodes.free == 0)
        pool.scale(9)
        assert len(pool._actors) == 1


@pytest.mark.ray
def test_who_grows_gives_back(make_pool, monkeypatch):
    """More are asked for than fit; what a stage cannot use any more is spare, and comes again."""
    monkeypatch.setattr("orchestrator.runtime.scaling.IDLE_SECONDS", 0.5)
    with make_pool("fine", Bounds(1, 3, is_growing=True), max_workers=9, cpus=4) as pool:
        assert len(pool.gather()) == 2
        assert len(pool._actors) == 3
        assert pool.scale(1) == 1
        assert len(pool._actors) == 3, "it may be wanted in a moment"
        assert wait_for(lambda: pool.scale(1) == 1 and not pool._joining)
        pool.give_back(next(iter(pool.workers())))
        assert pool.scale(1) == 0
        assert len(pool._actors) == 1
        assert pool.scale(2) == 0
        assert wait_for(lambda: not pool.wait(0.1) and len(pool.workers()) == 2)


@pytest.mark.ray
def test_a_late_worker_of_another_kind_is_not_used(make_pool, tmp_path):
    """What would have ended the start of a run is said, and the run goes on without it."""
    other, events = tmp_path / "other", []
    bounds = Bounds(1, 2, is_growing=True)
    with make_pool(str(other), bounds, max_workers=1, announce=events.append) as pool:
        pool.gather()
        other.touch()
        pool.scale(2)
        assert wait_for(lambda: not pool.wait(0.1) and any(e["event"] == "note" for e in events))
        assert len(pool.workers()) == len(pool._actors) == 1
        assert not pool.nodes.quarantined(), "another worker is of use there"
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert note.startswith("a late worker is not used: ")
    assert "2.12.1" in note


@pytest.mark.ray
def test_when_nobody_is_left_a_useless_worker_ends_the_run(make_pool, tmp_path):
    """There is none to go on with, so what is wrong with those that come is no side matter."""
    other = tmp_path / "other"
    with make_pool(str(other)) as pool:
        pool.gather()
        other.touch()
        pool.replace(next(iter(pool.workers())))
        with pytest.raises(InputError, match=r"2\.12\.1"):
            wait_for(lambda: pool.wait(0.1))


@pytest.mark.ray
def test_too_few_workers_in_time_is_infeasible(make_pool, half_taken, monkeypatch):
    """Who asks for more than there is room for now hears what is there, also while it waits."""
    monkeypatch.setattr("orchestrator.runtime.ray.actors.PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr("orchestrator.runtime.ray.actors.START_SECONDS", 6.0)
    says = "1 of 2 workers started within 6 s; 1 workers, 0 of 8 CPU free"
    events = []
    pool = make_pool("fine", Bounds(2, 2), max_workers=2, cpus=4, announce=events.append)
    with pool, pytest.raises(InfeasibleError, match=says):
        pool.gather()
    there = "1 workers, 0 of 8 CPU free"
    assert {"event": "waiting", "for": "1 of 2 workers to start", "there": there} in events


@pytest.mark.ray
def test_a_chunk_that_went_with_its_node_is_read_from_its_file(make_pool):
    """The call is repeated on the same worker, whose state is not lost, without the chunk."""
    import ray

    from orchestrator.runtime.calls import Call, Step

    class Owner:
        def make(self):
            return [ray.put({"x": np.ones(10**6)})]

    with make_pool("fine") as pool:
        pool.gather()
        (worker,) = pool.workers()
        call = Call(worker, Step(0), "blocks 2-3, chunk 0", 1, takes=(2, 0))
        for is_lost in (False, True):
            owner = ray.remote(Owner).remote()
            (record,) = ray.get(owner.make.remote())
            if is_lost:
                ray.kill(owner)
                assert wait_for(lambda ref=record: not is_readable(ray, ref))
            pool.start(call, record)
            outcomes, end = [], time.monotonic() + 10
            while not outcomes and time.monotonic() < end:
                outcomes = pool.wait(0.5)
            assert [outcome.value for outcome in outcomes] == [None if is_lost else 10**6]
            assert list(pool.workers()) == [worker]


def is_readable(ray, ref):
    try:
        ray.get(ref)
    except ray.exceptions.ObjectLostError:
        return False
    return True
