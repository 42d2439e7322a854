"""Events of progress: in the run's journal and status, also while a call blocks the driver."""

import time

import pytest

from orchestrator.cli.main import main
from orchestrator.progress.eta import Expected
from orchestrator.progress.tally import Counted
from orchestrator.runtime import progress
from orchestrator.runtime.calls import Call, Verify
from orchestrator.runtime.monitor import MOST_NAMED, RunMonitor
from orchestrator.store.run import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.claim({})
    return run


def reported(events):
    """The events of progress, once there are two."""
    while True:
        found = [event for event in events if event["event"] == "progress"]
        if len(found) > 1:
            return found
        time.sleep(0.005)


def test_an_error_of_the_receiver_ends_the_run(run, monkeypatch):
    """It is raised by the driver at its next event, as if that event had been refused."""
    monkeypatch.setattr(progress, "SECONDS", 0.01)

    def refuse(event):
        if event["event"] == "progress":
            raise ZeroDivisionError

    def work(monitor):
        with monitor.stage("write"):
            monitor.tally().look({"write": 1.0}, Counted(0, 1, "files"), present=1, useful=1)
            for _ in range(1000):
                monitor.event({"event": "polled"})
                time.sleep(0.005)

    with pytest.raises(ZeroDivisionError), RunMonitor(run, refuse) as monitor:
        work(monitor)
    assert run.status()["state"] == "failed"


def test_a_fraction_falls_only_with_the_count():
    """Not because calls turn out to be slower than others were."""
    now, call = [0.0], Call(0, Verify(()), "chunk")
    shown = progress.Progress(lambda event: None, lambda: "calibrate", clock=lambda: now[0])
    tally = shown.tally("calibrate")

    def fraction(to_do, *, done):
        tally.look(to_do, Counted(done, 4, "chunks"), present=1, useful=1)
        return shown.event()["fraction"]

    for kind, seconds in (("step", 1.0), ("finish", 30.0)):
        tally.begun(call, kind, 1.0)
        now[0] += seconds
        tally.over(call, succeeded=True)
        if kind == "step":
            assert fraction({"step": 1.0}, done=2) == 0.5
    later = {"step": 1.0, "finish": 9.0}
    assert fraction(later, done=2) == 0.5
    assert fraction(later, done=1) == pytest.approx(31 / (31 + 1 + 270), abs=1e-4)


def test_the_status_has_the_units_of_each_worker(run, capsys):
    """In the present stage; of many workers, those of each node."""
    with RunMonitor(run, None) as monitor:
        with monitor.stage("verify") as stage:
            stage.progress(1, 4, node="a", pid=1)
        with monitor.stage("write") as stage:
            for done, pid in enumerate((1, 2, 1), 1):
                stage.progress(done, 9, node="a", pid=pid)
            assert main(["status", str(run.root)]) == 0
            shown = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
            for pid in range(MOST_NAMED + 1):
                stage.progress(9, 9, node="b", pid=pid)
            assert run.status()["done_by"] == {"a": 3, "b": MOST_NAMED + 1}
    found = {row[0].removeprefix("units by "): row[-1].strip() for row in shown}
    assert (found["process 1 on a"], found["process 2 on a"]) == ("2", "1")


def test_progress_is_reported_while_a_call_runs(run, monkeypatch):
    """Events, status and journal have count, fraction and times; the journal not each event."""
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    events, call = [], Call(0, Verify(()), "chunk 2")
    with RunMonitor(run, events.append) as monitor:
        monitor.progress.expected = Expected(
            units={"calibrate": {"step": 1000.0, "finish": 2000.0}},
            stages={"calibrate": 5000.0, "write": 500.0},
        )
        with monitor.stage("calibrate"):
            tally = monitor.tally()
            tally.look({"step": 3.0, "finish": 1.0}, Counted(1, 4, "chunks"), present=1, useful=1)
            tally.begun(call, "step", 1.0)
            event = reported(events)[-1]
            status = run.status()
        assert event["stage"] == "calibrate"
        assert (event["done"], event["total"], event["of"]) == (1, 4, "chunks")
        assert event["running"][0]["call"] == "chunk 2"
        assert event["left"] == pytest.approx(5000.0, abs=60)
        assert event["run_left"] == pytest.approx(5500.0, rel=0.02)
        assert 0 <= event["fraction"] < 0.01
        shown = status["progress"]
        assert (shown["done"], shown["total"], shown["of"]) == (1, 4, "chunks")
        assert status["run_left"] == pytest.approx(5500.0, rel=0.02)
        with monitor.stage("write"):
            assert not {"progress", "left", "run_left"} & run.status().keys()
    assert not {"left", "run_left"} & run.status().keys()
    assert sum(event["event"] == "progress" for event in run.events()) == 1
