"""Events as lines of text."""

import io
import json
import threading
import time
from itertools import pairwise

import pytest
from rich.console import Console

from orchestrator.cli.lines import JsonLines, Lines
from orchestrator.readable import counted, duration, size


class ManualClock:
    """ManualClock that is set by the test; seconds."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def stream():
    return io.StringIO()


def unit(done, total=100):
    return {"event": "unit", "stage": "calibrate", "done": done, "total": total}


def test_a_run_in_lines(clock, stream):
    """Stages, units with remaining time, and notes are one line each."""
    show = Lines(stream, clock=clock)
    show({"event": "stage", "stage": "calibrate", "state": "begin"})
    for done in (1, 2):
        clock.now += 30
        show({**unit(done, total=4), "unit": f"block {done - 1}", "seconds": 2.5})
    show({"event": "note", "text": "all is well"})
    show({"event": "waiting", "for": "3 calls", "there": "2 workers"})
    show({"event": "workers", "workers": [{"node": "a", "pid": 3}, {"node": "b", "pid": 4}]})
    show({"event": "snapshot", "step": 0, "train": None, "held_out": 0.5})
    show({"event": "snapshot", "step": 7, "train": 0.5, "held_out": 0.25, "gradient": 1.0})
    show({"event": "lost", "unit": "block 2", "why": "gone"})
    show({"event": "stage", "stage": "calibrate", "state": "end", "seconds": 65.0})
    assert stream.getvalue().splitlines() == [
        "[0.0s] calibrate",
        "[30s] calibrate 1/4: block 0 in 2.5s, 1m30s left",
        "[1m00s] calibrate 2/4: block 1 in 2.5s, 1m00s left",
        "[1m00s] all is well",
        "[1m00s] waiting for 3 calls; available: 2 workers",
        "[1m00s] process 3 on a, process 4 on b",
        "[1m00s] step 0: 0.5000 on held-out sequences",
        "[1m00s] step 7: loss 0.5000 in training, 0.2500 on held-out sequences",
        "[1m00s] lost: unit block 2, why gone",
        "[1m00s] calibrate done in 1m05s",
    ]


def test_failures_in_lines(clock, stream):
    """A failure line has worker, cause, decision and record."""
    show = Lines(stream, clock=clock)
    where = {"unit": "block 2", "node": "a (12)", "pid": 3, "record": "failures/0001.json"}
    what = {"why": "no answer", "cause": "hung", "decided": "repeat"}
    show({"event": "lost", **where, **what})
    show({"event": "draining", "node": "a (12)", "deadline": None})
    show({"event": "draining", "node": "a (12)", "deadline": time.time() + 30.4})
    assert stream.getvalue().splitlines() == [
        "[0.0s] block 2: process 3 on a (12) hung: no answer; repeat, see failures/0001.json",
        "[0.0s] a (12) drains: its workers finish their calls, others take over",
        "[0.0s] a (12) drains in 30s: its workers finish their calls, others take over",
    ]


def test_fast_units_share_a_line(clock, stream):
    """One of several units that finish within a second is shown, and always the last one."""
    show = Lines(stream, clock=clock)
    for done in range(1, 101):
        clock.now += 0.1
        show(unit(done))
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 12
    assert lines[-1].endswith("calibrate 100/100")


def test_resumed_units_do_not_shorten_what_is_left(clock, stream):
    """The remaining time depends on units of this run only, not on reused ones."""
    show = Lines(stream, clock=clock)
    show({"event": "stage", "stage": "calibrate", "state": "begin"})
    clock.now = 10.0
    show(unit(91))
    assert stream.getvalue().endswith("1m30s left\n")


def test_a_stage_within_another_does_not_change_what_is_left_of_it(clock, stream):
    """Units count for their own stage, from its own start."""
    show = Lines(stream, clock=clock)
    show({"event": "stage", "stage": "train", "state": "begin"})
    show({"event": "stage", "stage": "verify", "state": "begin"})
    for done in range(1, 9):
        show({**unit(done, total=8), "stage": "verify"})
    show({"event": "stage", "stage": "verify", "state": "end", "seconds": 0.0})
    assert stream.getvalue().splitlines()[1:] == [
        "[0.0s] checking stored units",
        "[0.0s] checking stored units 1/8, 0.0s left",
        "[0.0s] checking stored units 8/8",
        "[0.0s] checking stored units done in 0.0s",
    ]
    clock.now = 20.0
    show({**unit(1, total=4), "stage": "train"})
    assert stream.getvalue().endswith("train 1/4, 1m00s left\n")


def progress(done, **more):
    """Event of progress of a stage of 960 chunks."""
    shown = {"event": "progress", "stage": "calibrate", "done": done, "total": 960, "of": "chunks"}
    times = {"fraction": 0.25, "left": 90.0, "run_left": 3720.0, "running": []}
    return shown | times | more


def test_progress_is_a_line_when_nothing_else_was_for_a_time(clock, stream):
    """With events each second there are lines, never ten seconds apart and never two in one."""
    show = Lines(stream, clock=clock)
    show({"event": "stage", "stage": "calibrate", "state": "begin"})
    times = []
    for second in range(60):
        clock.now += 1.0
        before = stream.tell()
        show(progress(16 * second))
        times += [clock.now] if stream.tell() > before else []
    assert times[0] == 1.0
    assert all(1 <= later - time < 10 for time, later in pairwise(times))
    assert (
        "calibrate 0/960 chunks, 25%, about 1m30s left of the stage, 1h02m of the run\n"
        in stream.getvalue()
    )


def test_units_say_the_estimated_time(clock, stream):
    """A line of a unit has the time that progress has estimated, not the mean time of units."""
    show = Lines(stream, clock=clock)
    show({"event": "stage", "stage": "calibrate", "state": "begin"})
    clock.now = 240.0
    show(progress(600))
    show(unit(1, total=30))
    assert stream.getvalue().endswith("calibrate 1/30, 1m30s left\n")


@pytest.mark.parametrize("is_activity", [True, False])
def test_a_silent_time_is_filled(is_activity, clock, stream):
    """Without events the present activity is named at most nine seconds later, without its cause;
    no other note replaces it."""
    show = Lines(stream, clock=clock)
    if is_activity:
        show({"event": "note", "text": "starting Ray again: late", "activity": True})
    show({"event": "note", "text": "a worker holds up to 2 GB"})
    for _ in range(20):
        clock.now += 1.0
        show.remind()
    doing = "starting Ray again"
    said = [f"[{n}s] {doing}, for {n}s" for n in ("9.0", 18)] if is_activity else []
    assert stream.getvalue().splitlines()[1 + is_activity :] == said


def test_silent_times_of_a_stage_are_filled_with_its_progress(clock, stream):
    """A late event of progress does not hide what the one before it said."""
    show = Lines(stream, clock=clock)
    show({"event": "stage", "stage": "calibrate", "state": "begin"})
    show(progress(312))
    clock.now = 9.0
    show.remind()
    assert stream.getvalue().splitlines()[-1].startswith("[9.0s] calibrate 312/960 chunks, 25%")


def test_lines_are_filled_by_a_thread(stream, monkeypatch):
    """The context has a thread that fills silent times, and ends it."""
    monkeypatch.setattr("orchestrator.cli.lines.BEAT_SECONDS", 0.001)
    monkeypatch.setattr("orchestrator.cli.lines.SILENT_SECONDS", 0.0)
    with Lines(stream) as show:
        show({"event": "note", "text": "starting", "activity": True})
        while stream.getvalue().count("starting, for") < 2:
            time.sleep(0.001)
    deadline = time.monotonic() + 10
    while any(thread.name == "lines" for thread in threading.enumerate()):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("width", [40, 80])
def test_the_live_display_shows_a_stage_in_few_rows(width, clock):
    """Bar, counts and times fit in the width; notes and failures stay above them."""
    from orchestrator.cli.live import LiveDisplay

    stream = io.StringIO()
    with LiveDisplay(stream, clock=clock) as show:
        show({"event": "stage", "stage": "calibrate", "state": "begin"})
        show({"event": "note", "text": "all is [well]"})
        show({**unit(3, total=30), "unit": "block 2"})
        shown = progress(312, running=[{"call": "blocks 2-3, chunk 5", "seconds": 61.0}])
        show({**shown, "workers": 2, "failures": 1, "memory": {"host": 5e8}})
        console = Console(width=width, file=io.StringIO())
        console.print(show.frame())
    rows = console.file.getvalue().splitlines()
    assert len(rows) == 5
    assert all(len(row) <= width for row in rows)
    assert rows[0].startswith("calibrate")
    assert rows[0].rstrip().endswith("25%")
    says = "312 of 960 chunks; 3 of 30 committed, last block 2"
    assert rows[1].startswith(says[:30])
    assert width == 40 or rows[1].rstrip() == says
    assert rows[2].rstrip() == "left: about 1m30s; run: about 1h02m"
    assert rows[3].startswith("2 workers, 1 failure")
    assert rows[4].rstrip() == "blocks 2-3, chunk 5, for 1m01s"
    assert "all is [well]" in stream.getvalue()


def test_a_frame_does_not_wait_for_a_line(stream):
    """A line is written with the lock of events held, and waits for the display's own lock, with
    which a frame is made: neither may wait for the other."""
    from orchestrator.cli.live import LiveDisplay

    show, made = LiveDisplay(stream), threading.Event()

    def draw():
        show.frame()
        made.set()

    with show._guard:
        threading.Thread(target=draw, daemon=True).start()
        assert made.wait(10)


def test_json_lines(stream):
    """As JSON every event is one line that parses back to it."""
    events = [unit(1), {"event": "note", "text": "two\nlines, é"}]
    show = JsonLines(stream)
    for event in events:
        show(event)
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == events


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.44, "0.4s"), (9.96, "10s"), (59.6, "1m00s"), (3599.6, "1h00m"), (7500, "2h05m")],
)
def test_duration(seconds, said):
    """Durations are rounded before they are split into units."""
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1e6 - 1, "1 MB"), (1.4e11, "140 GB")]
)
def test_size(count, said):
    """Sizes are in powers of 1000, to three digits."""
    assert size(count) == said


def test_counts_are_written_with_their_noun():
    """One is singular; all other counts, zero included, are plural."""
    shown = [counted(0, "unit"), counted(1, "unit"), counted(2000, "unit"), counted(2, "is", "are")]
    assert shown == ["0 units", "1 unit", "2,000 units", "2 are"]
