"""Status of a run for each kind of end, and its reaction to signals."""

import hashlib
import json
import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from orchestrator.errors import InputError, StoppedError
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.signals import STOPPING
from orchestrator.store.run import RunDirectory
from orchestrator.usage import DeviceUsage, Usage


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.claim({})
    return run


def ended(run):
    status = run.status()
    return status["state"], status["exit_code"]


def test_a_run_says_how_it_ended(run):
    """The status is done, failed with the error's code and message, or failed by a code fault."""
    with RunMonitor(run, None):
        assert run.status()["state"] == "running"
    assert ended(run) == ("done", 0)
    with pytest.raises(InputError), RunMonitor(run, None):
        raise InputError("text: empty")
    assert ended(run) == ("failed", 4)
    assert run.status()["error"] == "text: empty"
    with pytest.raises(ZeroDivisionError), RunMonitor(run, None):
        raise ZeroDivisionError
    assert ended(run) == ("failed", 1)


def test_the_journal_says_how_each_run_ended(run):
    """Beginning and end of every run are in the journal, in order, and are not passed on."""
    events = []
    for error in (None, InputError("text: empty"), KeyboardInterrupt()):
        with suppress(type(error) if error else ()), RunMonitor(run, events.append) as monitor:
            monitor.note("at work")
            if error is not None:
                raise error
    begun = {"event": "run", "state": "begin"}
    ends = [
        {"state": "done", "exit_code": 0},
        {"state": "failed", "exit_code": 4, "error": "text: empty"},
        {"state": "stopped", "exit_code": 75},
    ]
    note = {"event": "note", "text": "at work"}
    expected = [each for end in ends for each in (begun, note, {"event": "run", **end})]
    journal = [{n: v for n, v in event.items() if n != "time"} for event in run.events()]
    assert journal == expected
    assert events == [note] * 3


def worker(node, pid):
    return {"node": node, "pid": pid}


def test_the_status_says_who_is_at_work_and_what_is_left(run):
    """Workers and failures are counted, and the remaining time follows from this run's units."""
    with RunMonitor(run, None) as monitor:
        with monitor.stage("calibrate") as stage:
            workers = [worker("a", 1), worker("a", 2), worker("b", 1)]
            monitor.event({"event": "workers", "workers": workers})
            status = run.status()
            assert (status["workers"], status["nodes"], status["failures"]) == (3, 2, 0)
            time.sleep(0.02)
            stage.progress(6, 10)
            assert 0.08 <= run.status()["left"] < 1
            monitor.event(
                {"event": "lost", **worker("b", 1), "unit": "block 6", "log": "its words"}
            )
            monitor.event({"event": "retired", **worker("a", 2)})
            status = run.status()
            assert (status["workers"], status["nodes"], status["failures"]) == (1, 1, 1)
            monitor.event({"event": "workers", "workers": [worker("c", 5)]})
            assert run.status()["nodes"] == 2
        with monitor.stage("write"):
            assert not {"done", "total", "left"} & run.status().keys()


def test_a_stage_says_how_busy_its_workers_were(run):
    """Utilisation covers all passes of a stage, even with another stage in between."""
    events = []
    with RunMonitor(run, events.append) as monitor:
        with monitor.stage("calibrate"):
            monitor.event({"event": "busy", "seconds": 3.0, "of": 4.0})
            with monitor.stage("verify"):
                pass
            monitor.event({"event": "busy", "seconds": 0.0, "of": 2.0})
        assert monitor.busy == {"calibrate": 0.5}
    _, *between, end = events
    assert [each["stage"] for each in between] == ["verify", "verify"]
    assert "busy" not in between[1]
    assert end["busy"] == 0.5


def test_a_stage_says_what_memory_its_workers_took(run):
    """The status has the elementwise maximum of all calls, and the journal that of each stage."""
    events, device = [], {"allocated": 5, "reserved": 7, "context": 2}
    with RunMonitor(run, events.append) as monitor:
        with monitor.stage("calibrate"):
            monitor.event({"event": "memory", "host": 3, "device": device})
            monitor.event({"event": "memory", "host": 9, "device": {**device, "allocated": 4}})
        with monitor.stage("write") as stage:
            monitor.event({"event": "memory", "host": 9})
            stage.progress(1, 2)
            assert run.status()["memory"] == {"host": 9}
    assert monitor.memory == {
        "calibrate": Usage(host=9, device=DeviceUsage(**device)),
        "write": Usage(host=9),
    }
    assert not [event for event in events if event["event"] == "memory"]
    ends = [event["memory"] for event in events if event.get("state") == "end"]
    assert ends == [usage.to_json() for usage in monitor.memory.values()]


def test_a_failure_is_on_record_with_its_log(run):
    """The journal names the file of a failure; numbers continue in the next run."""
    failed = {"event": "failed", "unit": "block 6", "why": "no", "log": "line one\nline two"}
    events = []
    for number in (1, 2):
        with RunMonitor(run, events.append) as monitor:
            monitor.event(failed)
        record = json.loads((run.root / f"failures/000{number}.json").read_text())
        assert record.pop("time") > 0
        assert record == failed
    named = [event["record"] for event in events]
    assert named == ["failures/0001.json", "failures/0002.json"]
    assert not any("log" in event for event in events)
    assert run.status()["failures"] == 2


def perform(run, work):
    with RunMonitor(run, None) as monitor:
        work(monitor)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_stops_where_the_program_is(run, number):
    """A signal raises StoppedError, writes the status, and the handlers are restored."""
    before = [signal.getsignal(each) for each in STOPPING], signal.set_wakeup_fd(-1)
    went_on = []

    def work(monitor):
        signal.raise_signal(number)
        went_on.append(True)

    with pytest.raises(StoppedError, match=rf"stopped by {number.name}; .* resumes"):
        perform(run, work)
    assert not went_on
    assert ended(run) == ("stopped", 75)
    assert ([signal.getsignal(each) for each in STOPPING], signal.set_wakeup_fd(-1)) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_a_signal_is_noted_while_the_program_is_away(run):
    """The status is written at once, even while the main thread is in native code."""
    seen, away = [], []

    def stop():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        sent = time.monotonic()
        while run.status()["state"] != "stopped":
            time.sleep(0.005)
        seen.append(time.monotonic() - sent)

    def work(monitor):
        thread.start()
        begun = time.monotonic()
        try:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)
        finally:
            away.append(time.monotonic() - begun)

    thread = threading.Thread(target=stop)
    with pytest.raises(StoppedError):
        perform(run, work)
    thread.join()
    assert seen[0] < away[0] - 0.2


def test_more_signals_change_nothing(run):
    """A second signal does not interrupt the clean-up after the first."""
    cleaned = []

    def work(monitor):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)

    with pytest.raises(StoppedError, match="SIGTERM"):
        perform(run, work)
    assert cleaned
    assert ended(run) == ("stopped", 75)


def test_a_swallowed_signal_stops_at_the_next_event(run):
    """A run stops even if a library swallows the exception."""
    went_on = []

    def work(monitor):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            time.sleep(0.2)
        monitor.note("still here")
        went_on.append(True)

    with pytest.raises(StoppedError):
        perform(run, work)
    assert not went_on


def test_a_deferred_signal_is_noted_now_and_obeyed_later(run):
    """A deferred part is completed before the interrupt; the status is written at once."""
    noted, went_on = [], []

    def work(monitor):
        with monitor.signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
            noted.append(ended(run))
        went_on.append(True)

    with pytest.raises(StoppedError):
        perform(run, work)
    assert noted == [("stopped", 75)]
    assert not went_on


def test_a_run_in_another_thread_takes_no_signals(run):
    """Outside the main thread no handlers are installed."""
    before = [signal.getsignal(each) for each in STOPPING]
    inside = []

    def work():
        with RunMonitor(run, None):
            inside.append([signal.getsignal(each) for each in STOPPING])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
    assert ended(run) == ("done", 0)
