"""Leases of runs: reported to a second driver, taken over from an ended one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from drivers import Driver, is_unit
from object_store import remote
from pipeline import contents, run, write_llama, write_text

from orchestrator.cli.main import main
from orchestrator.errors import OrchestratorError, StoppedError, UsageError
from orchestrator.store import lease as leases
from orchestrator.store.files import write_json
from orchestrator.store.lease import LEASE_FILE, Lease
from orchestrator.store.places import Remote
from orchestrator.store.run import RunDirectory

HERE = socket.gethostname()


@pytest.fixture(params=["disk", "store"])
def place(request, tmp_path):
    """Place of a lease, on local disk and in an object store."""
    if request.param == "disk":
        return tmp_path / "run" / LEASE_FILE
    s3 = request.getfixturevalue("s3")
    return remote(s3.uri(f"leases/{tmp_path.name}/run")) / LEASE_FILE


@pytest.fixture
def quick(monkeypatch):
    """Shorten the times of leases to tenths of a second."""
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(leases, "STALE_SECONDS", 1.0)


def found(**fields):
    return {"id": "x", "host": HERE, "pid": 1, "since": 0.0, "renewed": time.time()} | fields


def gone():
    """Return the id of an ended process."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_is_given_back(place, quick):
    """The lease exists and is renewed while the body runs, and is removed afterwards."""
    with Lease(place).taken():
        before = json.loads(place.read_bytes())
        time.sleep(0.6)
        after = json.loads(place.read_bytes())
        assert after["renewals"] > before["renewals"]
        assert (after["id"], after["host"]) == (before["id"], HERE)
    assert not place.exists()

    def interrupted():
        with Lease(place).taken():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not place.exists()


def test_a_second_holder_is_told_of_the_first(place, quick):
    """A second holder, in any process, is refused with the name of the first, which keeps it."""
    with Lease(place).taken():
        with pytest.raises(UsageError, match=rf"in use by process \d+ on {HERE} since \d"):
            Lease(place).taken().__enter__()
        assert place.exists()


def test_a_lease_of_a_dead_process_is_taken_over(place, quick):
    """On this host the take-over is immediate, with a note that names the old holder."""
    write_json(place, found(pid=gone()))
    begun = time.monotonic()
    with Lease(place).taken() as lease:
        assert "has ended; taken over" in lease.note
        assert time.monotonic() - begun < 0.8
    assert not place.exists()


@pytest.mark.parametrize("holder", [{"host": "elsewhere"}, {"pid": 1, "renewed": 0.0}, {}])
def test_a_lease_that_nobody_renews_is_taken_over(holder, place, quick):
    """A lease of another host, or with a reused process id, is taken over after a wait."""
    write_json(place, found(**holder) if holder else {})
    told = []
    begun = time.monotonic()
    with Lease(place).taken(told.append) as lease:
        assert time.monotonic() - begun >= 1.0
        assert "without renewing" in lease.note
    assert [event["event"] for event in told] == ["waiting"]


def test_a_lease_elsewhere_that_is_renewed_stays(place, quick):
    """A renewed lease is valid, regardless of the clocks of the hosts."""
    code = """
import socket, sys, time
from orchestrator.store import lease
from orchestrator.store.places import parse_place
lease.RENEW_SECONDS = 0.2
socket.gethostname = lambda: "elsewhere"
time.time = lambda: 1000.0
with lease.Lease(parse_place(sys.argv[1])).taken():
    print(flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code, str(place)], **pipes)
    other.stdout.readline()
    try:
        with pytest.raises(UsageError, match="on elsewhere"):
            Lease(place).taken().__enter__()
    finally:
        other.communicate()
    with Lease(place).taken() as lease:
        assert lease.note is None


def test_who_lost_its_lease_does_not_take_it_back(place, quick):
    """A driver that lost its lease does not renew or remove that of its successor."""
    with Lease(place).taken() as lease:
        write_json(place, found(id="other"))
        time.sleep(0.5)
        assert lease.taken_by == f"process 1 on {HERE}"
        assert json.loads(place.read_bytes())["id"] == "other"
    assert json.loads(place.read_bytes())["id"] == "other"


def test_a_lease_that_was_removed_is_made_anew(place, quick):
    """A removed lease without another holder is written again."""
    with Lease(place).taken() as lease:
        before = json.loads(place.read_bytes())["id"]
        place.unlink()
        time.sleep(0.5)
        assert json.loads(place.read_bytes())["id"] == before
        assert lease.taken_by is None
    assert not place.exists()


def test_of_many_at_once_one_gets_the_lease(place, quick):
    """One of several drivers that start at the same moment gets the lease, the others are
    refused."""
    code = """
import sys
from orchestrator.errors import UsageError
from orchestrator.store import lease
from orchestrator.store.places import parse_place
place = parse_place(sys.argv[1])
place.exists()
print(flush=True)
sys.stdin.readline()
try:
    with lease.Lease(place).taken():
        print("held", flush=True)
        sys.stdin.readline()
except UsageError:
    print("told", flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, str(place)]
    drivers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    try:
        for driver in drivers:
            driver.stdout.readline()
        for driver in drivers:
            driver.stdin.write("\n")
            driver.stdin.flush()
        said = [driver.stdout.readline().strip() for driver in drivers]
    finally:
        for driver in drivers:
            driver.communicate()
    assert sorted(said) == ["held", "told", "told", "told"]
    assert not place.exists()


@contextmanager
def another_takes(place):
    """Another driver is about to take the lease while the body runs."""
    if isinstance(place, Remote):
        other = place.with_name(f"{place.name}-other")
        write_json(other, {})
        yield
        other.unlink()
    else:
        place.parent.mkdir(exist_ok=True)
        with leases._locked(place.parent):
            yield


@pytest.mark.parametrize("left", [None, {"pid": 0}])
def test_a_driver_that_is_not_alone_waits(left, place, quick):
    """A driver neither writes nor removes the file while another one takes the lease."""
    if left is not None:
        write_json(place, found(**left))
    before = place.read_bytes() if left is not None else None
    lease = Lease(place)
    taking = threading.Thread(target=lease._take, args=(None,), daemon=True)
    with another_takes(place):
        taking.start()
        time.sleep(0.5)
        assert (place.read_bytes() if place.exists() else None) == before
    taking.join(timeout=10)
    assert json.loads(place.read_bytes())["id"] == lease._id
    lease._release()


def test_a_driver_killed_while_taking_the_lease_stops_no_other(s3, tmp_path, quick):
    """The object that it has left in the store is removed as stale."""
    place = remote(s3.uri(f"leases/{tmp_path.name}/run")) / LEASE_FILE
    write_json(place.with_name(f"{LEASE_FILE}-gone"), {})
    with Lease(place).taken():
        assert set(place.parent.sizes()) == {LEASE_FILE}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", hidden=96)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    run(llama, out, text)
    return contents(out)


def once(wanted, action):
    """Event callback that acts at the first matching event; the run waits for it."""
    waiting = [action]

    def on_event(event):
        if waiting and wanted(event):
            waiting.pop()()

    return on_event


@pytest.mark.chaos
def test_two_drivers_on_one_run(llama, text, reference, tmp_path, capsys):
    """The second driver names the first, exits with 2, and does not disturb it."""
    out, elsewhere = tmp_path / "out", str(tmp_path / "elsewhere")
    said = []

    def others():
        for flags in ((), ("--run-dir", elsewhere)):
            driver = Driver(llama, out, text, "--executor", "local", *flags)
            assert driver.end() == 2
            said.extend(line for line in driver.other if "error" in line)
        assert RunDirectory(tmp_path / "out.run").status()["state"] == "running"
        assert main(["clean", str(tmp_path / "out.run")]) == 2

    run(llama, out, text, on_event=once(is_unit(2), others))
    told = f"in use by process {os.getpid()} on {HERE} since"
    assert [told in line for line in said] == [True, True]
    assert f"{out}.run: " in said[0]
    assert f"{out}: " in said[1]
    assert f"process {os.getpid()}" in capsys.readouterr().err
    assert contents(out) == reference
    assert not (tmp_path / "out.run" / LEASE_FILE).exists()


@pytest.mark.parametrize("directory", ["out.run", "out"])
def test_who_lost_its_lease_leaves_the_run_alone(directory, llama, text, tmp_path, quick):
    """The driver names its successor, exits as stopped, and does not overwrite its status."""
    out, file = tmp_path / "out", {"out": ".orchestrator-hold.json", "out.run": LEASE_FILE}
    status = tmp_path / "out.run" / "status.json"

    def take():
        write_json(tmp_path / directory / file[directory], found(id="other", host="there"))
        time.sleep(0.5)
        status.write_text("theirs")

    with pytest.raises(StoppedError, match=f"^process 1 on there has taken over .*{directory}, "):
        run(llama, out, text, on_event=once(is_unit(2), take))
    assert status.read_text() == "theirs"
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_a_run_directory_removed_under_its_driver(
    seconds, llama, text, tmp_path, monkeypatch, quick
):
    """The run ends, whether a file or the lease is missed first; the directory is named, and what
    is written there in the meantime is removed."""
    monkeypatch.setattr("orchestrator.store.run.REMAINS_SECONDS", (0.0, 0.2))
    root, told = tmp_path / "out.run", []

    def remove():
        root.rename(tmp_path / "elsewhere")
        time.sleep(seconds)

    act = once(is_unit(2), remove)
    with pytest.raises(OrchestratorError, match=rf"^{root}: was removed or renamed"):
        run(llama, tmp_path / "out", text, on_event=lambda event: (told.append(event), act(event)))
    assert not root.exists()
    assert [event.get("done") for event in told if event["event"] == "unit"][-1] == 2


@pytest.mark.parametrize(("moment", "seconds"), [(is_unit(2), 0.6), (is_unit(1, "write"), 0.0)])
def test_an_output_removed_under_its_driver(
    moment, seconds, llama, text, reference, tmp_path, quick
):
    """The run ends, whether the lease or a file is missed first; nothing is left at its place, and
    the same command continues."""
    out = tmp_path / "out"

    def remove():
        out.rename(tmp_path / "elsewhere")
        time.sleep(seconds)

    with pytest.raises(OrchestratorError, match=rf"^{out}: was removed or renamed while this run"):
        run(llama, out, text, on_event=once(moment, remove))
    assert not out.exists()
    status = RunDirectory(tmp_path / "out.run").status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    run(llama, out, text)
    assert contents(out) == reference


@pytest.mark.chaos
def test_two_drivers_that_run_after_all_damage_nothing(
    llama, text, reference, tmp_path, monkeypatch
):
    """If one loses its lease, both continue, and the result is the undisturbed one.

    One may end early if the other has removed files that it needs; the same command resumes.
    """
    # a renewal would restore the lease before the second driver reads it
    monkeypatch.setattr("orchestrator.store.lease.RENEW_SECONDS", 3600.0)
    out = tmp_path / "out"
    drivers = []

    def another():
        (tmp_path / "out.run" / LEASE_FILE).unlink()
        (out / ".orchestrator-hold.json").unlink()
        drivers.append(Driver(llama, out, text, "--executor", "local", "--shards", "3"))
        assert drivers[0].until(is_unit(2))

    with suppress(OrchestratorError):
        run(llama, out, text, shards=5, on_event=once(is_unit(1), another))
    assert drivers[0].end() in (0, 1)
    run(llama, out, text)
    assert contents(out) == reference
    units = RunDirectory(tmp_path / "out.run").units
    assert all(units.verify(key) for key in units.begun())


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_driver_leaves_no_lease(number, llama, text, reference, tmp_path):
    """A stopped driver releases its lease; that of a killed one is recognised at once."""
    out = tmp_path / "out"
    driver = Driver(llama, out, text, "--executor", "local")
    assert driver.until(is_unit(2))
    os.kill(driver.run.status()["pid"], number)
    driver.end()
    killed = number == signal.SIGKILL
    assert (driver.run.root / LEASE_FILE).exists() is killed
    assert (out / ".orchestrator-hold.json").exists() is killed
    events = []
    run(llama, out, text, on_event=events.append)
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert sum("taken over" in note for note in notes) == 2 * killed
    assert contents(out) == reference
