"""Killed workers, killed and stopped drivers, damaged files: the same bytes as if nothing happened.

Actors and drivers are killed for good, with SIGKILL, by their process id.
"""

import json
import os
import random
import signal
import tempfile

import pytest
from drivers import Driver, is_alive, is_unit, processes_naming, start, units, wait_for
from pipeline import contents, run, write_llama, write_text

from orchestrator import evaluate
from orchestrator.cli.main import main
from orchestrator.errors import StoppedError
from orchestrator.store.run import RunDirectory

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", hidden=96)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Files of an undisturbed run in one process, written as one file and as ten."""
    root = tmp_path_factory.mktemp("reference")
    run(llama, root / "one", text)
    run(llama, root / "ten", text, max_shard_size="200KB", run_dir=str(root / "one.run"))
    return {"one": contents(root / "one"), "ten": contents(root / "ten")}


class Killer:
    """An event callback that kills a worker when its time has come, and keeps what it saw."""

    def __init__(self, moments, rng=None):
        self.moments = list(moments)
        self.rng = rng or random.Random(0)
        self.events, self.pids, self.killed = [], [], []

    def __call__(self, event):
        self.events.append(event)
        if event["event"] == "workers":
            self.pids += [worker["pid"] for worker in event["workers"]]
        if self.moments and self.moments[0](event):
            self.moments.pop(0)
            alive = [pid for pid in self.pids if pid not in self.killed]
            pid = self.rng.choice(alive)
            self.killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    def count(self, name):
        return sum(event["event"] == name for event in self.events)


def nothing_is_left(killer, run_dir):
    """No actor of the run is alive, and no chunk is kept."""
    chunks = [path for path in (run_dir / "chunks").rglob("*") if path.is_file()]
    return wait_for(lambda: not any(map(is_alive, killer.pids))) and not chunks


MOMENTS = [
    lambda event: event["event"] == "workers",
    is_unit(4),
    is_unit(2, "write"),
    is_unit(6, "write"),
]
"""Before the first unit, in the middle, and twice while files are written."""


@pytest.mark.ray
def test_a_killed_actor_changes_no_byte(llama, text, reference, tmp_path, ray_address):
    """Whenever a worker is killed, another takes over, and the result is the undisturbed one."""
    killer = Killer(MOMENTS)
    fields = {"executor": "ray", "workers": 2, "shards": 5, "max_shard_size": "200KB"}
    run(llama, tmp_path / "out", text, on_event=killer, **fields)
    assert contents(tmp_path / "out") == reference["ten"]
    assert len(killer.killed) == 4
    assert killer.count("lost") >= 3
    assert nothing_is_left(killer, tmp_path / "out.run")


@pytest.mark.ray
def test_actors_killed_at_random_change_no_byte(llama, text, reference, tmp_path, ray_address):
    """Two of three workers, killed at random units, whoever does them."""
    rng = random.Random(1)
    moments = [is_unit(done) for done in sorted(rng.sample(range(1, 10), 2))]
    killer = Killer(moments, rng)
    run(llama, tmp_path / "out", text, on_event=killer, executor="ray", workers=3, shards=10)
    assert contents(tmp_path / "out") == reference["one"]
    assert len(killer.killed) == 2
    assert nothing_is_left(killer, tmp_path / "out.run")


@pytest.mark.ray
def test_a_killed_actor_changes_no_score(llama, text, tmp_path, ray_address):
    """An evaluation that lost workers on the way reports what an undisturbed one reports."""
    fields = {"samples": 12, "sequence_length": 48, "text": str(text)}
    killer = Killer([lambda event: event["event"] == "workers", is_unit(3, "evaluate")])
    spread = {"executor": "ray", "workers": 2, "shards": 4, "on_event": killer}
    disturbed = evaluate(llama, run_dir=tmp_path / "disturbed", **spread, **fields)
    alone = evaluate(llama, run_dir=tmp_path / "alone", executor="local", **fields)
    assert killer.count("lost") >= 1
    assert disturbed["models"]["model"]["perplexity"] == alone["models"]["model"]["perplexity"]
    assert nothing_is_left(killer, tmp_path / "disturbed")


def flags(executor, request, **others):
    """Flags of a driver; the cluster is asked for only if it is needed."""
    shown = {"executor": executor, **others}
    if executor == "ray":
        shown |= {"address": request.getfixturevalue("ray_address"), "workers": 2}
    return [flag for name, value in shown.items() for flag in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("executor", "resumed"),
    [
        ("local", {"executor": "local", "shards": 3}),
        pytest.param("ray", {"executor": "ray", "workers": 1, "shards": 7}, marks=pytest.mark.ray),
    ],
)
def test_a_killed_driver_is_resumed(
    executor, resumed, llama, text, reference, tmp_path, request, capsys
):
    """The run says it was lost; the same command, cut and staffed as you like, does the rest."""
    driver = Driver(llama, tmp_path / "out", text, *flags(executor, request), "--shards", "5")
    assert driver.until(is_unit(3))
    driver.kill()
    capsys.readouterr()
    assert main(["status", str(driver.run.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "lost"
    events = []
    run(llama, tmp_path / "out", text, on_event=events.append, **resumed)
    assert units(events) <= 10 - 3
    assert contents(tmp_path / "out") == reference["one"]
    assert driver.run.status()["state"] == "done"


@pytest.mark.parametrize(
    ("executor", "number"),
    [
        ("local", signal.SIGTERM),
        ("local", signal.SIGINT),
        pytest.param("ray", signal.SIGTERM, marks=pytest.mark.ray),
    ],
)
def test_a_stopped_driver_is_resumed(executor, number, llama, text, reference, tmp_path, request):
    """Exit code 75, `stopped` in the status within two seconds, and nothing is lost or doubled.

    A second signal on the heels of the first changes nothing of that.
    """
    driver = Driver(llama, tmp_path / "out", text, *flags(executor, request), "--shards", "5")
    assert driver.until(is_unit(3))
    again = 0.1 if number == signal.SIGINT else None
    stopped, _ = driver.signal_and_time(number, again=again)
    assert stopped < 2
    assert driver.process.returncode == 75
    assert driver.run.status()["exit_code"] == 75
    assert len(driver.other) == 1
    assert "stopped by" in driver.other[0]
    events = []
    run(llama, tmp_path / "out", text, on_event=events.append, shards=2)
    assert units(events) <= 10 - 3
    assert contents(tmp_path / "out") == reference["one"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_signal_before_the_run_begins(number, module, tmp_path):
    """While packages are imported there is nothing to resume: one line after their announcement,
    exit code 75, no traces. The places exist, since they are looked up before."""
    code = f"""
import os, sys
from orchestrator import evaluate
from orchestrator.cli.main import main
def hook(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), {int(number)})
sys.addaudithook(hook)
sys.exit(main(["compress", "../dense", "out", "--keep", "0.5", "--calibration", "bundled"]))
"""
    for place in ("dense", "here"):
        (tmp_path / place).mkdir()
    process = start("-c", code, forked=False, cwd=tmp_path / "here")
    output, error = process.communicate()
    assert process.returncode == 75
    announced, line = error.splitlines()
    assert announced.endswith("] importing torch and transformers")
    assert line == f"orchestrator: error: stopped by {number.name} before the run began"
    assert output == ""
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.ray
def test_a_signal_while_ray_is_started(llama, text, tmp_path):
    """The status does not wait for Ray to be up, and no process of Ray is left."""
    with tempfile.TemporaryDirectory(prefix="or-", ignore_cleanup_errors=True) as session:
        environment = {"RAY_TMPDIR": session}
        driver = Driver(llama, tmp_path / "out", text, "--workers", "2", env=environment)
        assert driver.until(lambda event: "starting a local Ray" in event.get("text", ""))
        assert wait_for(lambda: processes_naming(session) - {driver.process.pid})
        stopped, _ = driver.signal_and_time(signal.SIGTERM)
        assert stopped < 2
        assert driver.process.returncode == 75
        assert not any("Traceback" in line for line in driver.other)
        assert wait_for(lambda: not processes_naming(session))


class Interruption(Exception):
    """Raised by an event callback to end a run somewhere."""


def interrupted(llama, text, out, done):
    """Runs in this process until so many blocks are committed; gives the run directory."""

    def interrupt(event):
        if is_unit(done)(event):
            raise Interruption

    with pytest.raises(Interruption):
        run(llama, out, text, shards=5, on_event=interrupt)
    return RunDirectory(out.with_name(f"{out.name}.run"))


def flip(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed", "manifest"])
def test_a_damaged_unit_is_made_again(damage, llama, text, reference, tmp_path):
    """A resumed run trusts no committed file without having read it."""
    directory = interrupted(llama, text, tmp_path / "out", done=4)
    (file,) = sorted(directory.root.glob("units/*/*/*.mlp.up_proj.safetensors"))[:1]
    if damage == "flipped":
        flip(file)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "removed":
        file.unlink()
    else:
        flip(file.with_name("manifest.json"))
    events = []
    run(llama, tmp_path / "out", text, shards=5, on_event=events.append)
    assert units(events) == 10 - 4 + 1
    assert sum(event["event"] == "damaged" for event in events) == (damage == "flipped")
    assert contents(tmp_path / "out") == reference["one"]


def test_a_damaged_chunk_is_made_again(llama, text, reference, tmp_path):
    """A boundary chunk whose hash is wrong is computed again by the shards before it."""
    directory = interrupted(llama, text, tmp_path / "out", done=4)
    files = sorted(directory.root.glob("chunks/*/00004/*.safetensors"))
    assert len(files) == 6
    flip(files[3])
    events = []
    run(llama, tmp_path / "out", text, shards=5, on_event=events.append)
    missing = [event["unit"] for event in events if event["event"] == "missing"]
    assert missing == ["blocks 4-5, chunk 3"]
    assert units(events) == 10 - 4
    assert contents(tmp_path / "out") == reference["one"]


@pytest.mark.parametrize("damage", [flip, os.unlink], ids=["flipped", "removed"])
def test_a_damaged_file_of_the_checkpoint_is_written_again(
    damage, llama, text, reference, tmp_path
):
    """Files that were written before the run was interrupted are kept only if they are whole."""

    def interrupt(event):
        if is_unit(6, "write")(event):
            raise Interruption

    fields = {"max_shard_size": "200KB"}
    with pytest.raises(Interruption):
        run(llama, tmp_path / "out", text, on_event=interrupt, **fields)
    assert not (tmp_path / "out" / "config.json").exists()
    damage(sorted((tmp_path / "out").glob("*.safetensors"))[2])
    events = []
    run(llama, tmp_path / "out", text, on_event=events.append, **fields)
    assert (units(events), units(events, "write")) == (0, len_of(reference) - 6 + 1)
    assert contents(tmp_path / "out") == reference["ten"]


def len_of(reference):
    return sum(name.endswith(".safetensors") for name in reference["ten"])


def test_damaged_tokens_are_stored_again(llama, text, reference, tmp_path):
    """Stored tokens are compared with those of the text at hand."""
    directory = interrupted(llama, text, tmp_path / "out", done=2)
    (file,) = directory.root.glob("units/*/*/tokens.safetensors")
    flip(file)
    run(llama, tmp_path / "out", text, shards=5)
    assert contents(tmp_path / "out") == reference["one"]


def test_a_signal_in_a_script_is_an_exception(llama, text, reference, tmp_path):
    """Called from Python, a stop is `StoppedError`; the script goes on and may call again."""

    def stop(event):
        if is_unit(3)(event):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run(llama, tmp_path / "out", text, on_event=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    run(llama, tmp_path / "out", text)
    assert contents(tmp_path / "out") == reference["one"]
