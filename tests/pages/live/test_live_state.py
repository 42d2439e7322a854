"""State of a run as a function of its events: begin, units, failure, resumption, end."""

import math
import os
import socket
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.pages.live.files import RunFiles
from orchestrator.pages.live.losses import BlockLosses, SnapshotLosses
from orchestrator.pages.live.page import live_sections
from orchestrator.pages.live.rows import MOST_WORKERS
from orchestrator.pages.live.state import CALIBRATED, MOST_BLOCKS, RunState, state_of
from orchestrator.store.run import RunDirectory

SURVEYED = {
    "event": "surveyed",
    "blocks": 4,
    "group": 1,
    "linears": 28,
    "stages": ["survey", "read", "calibrate", "allocate", "refine", "train", "write"],
}
A, B = {"node": "a", "pid": 1}, {"node": "b", "pid": 7}


def begin(stage):
    return {"event": "stage", "stage": stage, "state": "begin"}


def end(stage, **fields):
    return {"event": "stage", "stage": stage, "state": "end", "seconds": 2.0, **fields}


def unit(stage, block, done, total=4, **fields):
    about = {"event": "unit", "stage": stage, "done": done, "total": total}
    return {**about, "unit": f"block {block}", **fields}


def timed(*events):
    """The events, one second apart."""
    return [{"time": 100.0 + second, **event} for second, event in enumerate(events)]


START = [{"event": "run", "state": "begin"}, begin("survey"), end("survey"), SURVEYED]
WORKERS = {"event": "workers", "workers": [A, B]}


def test_no_events_are_no_run():
    assert state_of([]) == RunState()


def test_blocks_are_lit_stage_by_stage():
    """A block is calibrated when its last call begins, and committed with its unit."""
    events = timed(
        *START,
        WORKERS,
        begin("calibrate"),
        {"event": "finishing", "block": 0, "unit": "block 0, finish", **A},
        unit("calibrate", 0, 1),
        {"event": "finishing", "block": 1, "unit": "block 1, finish", **B},
    )
    state = state_of(events)
    assert state.blocks == 4
    assert state.cells == {
        "survey": {},
        "calibrate": {0: "done", 1: "busy"},
        CALIBRATED: {0: "done", 1: "done"},
    }
    assert [each.doing for each in state.workers.values()] == ["", "block 1"]
    calibrate = state.stages["calibrate"]
    assert (calibrate.state, calibrate.parts) == ("running", (1, 4, "blocks"))
    assert calibrate.share == 0.25
    assert state.stage == "calibrate"


def test_a_stage_ends_with_its_figures():
    """Seconds add up over the passes of a stage; utilisation and memory are those of its end."""
    memory = {"host": 5}
    events = [*START, begin("verify"), end("verify"), begin("verify")]
    events.append(end("verify", busy=0.5, memory=memory))
    verify = state_of(timed(*events)).stages["verify"]
    assert (verify.state, verify.seconds, verify.share) == ("done", 4.0, 1.0)
    assert (verify.busy, verify.memory) == (0.5, memory)


def test_throughput_is_that_of_the_finest_parts():
    """Chunks count from the first progress event on, by the announced fraction if there is one."""
    chunks = {"event": "progress", "stage": "calibrate", "total": 48, "of": "chunks"}
    events = [*START, begin("calibrate"), unit("calibrate", 0, 1)]
    events += [chunks | {"done": 12, "left": 9.0, "run_left": 80.0}]
    events += [unit("calibrate", 1, 2), chunks | {"done": 18, "left": 7.5, "run_left": 60.0}]
    state = state_of(timed(*events))
    calibrate = state.stages["calibrate"]
    assert (calibrate.parts, calibrate.rate) == ((18, 48, "chunks"), 3.0)
    assert (calibrate.left, state.run_left, calibrate.share) == (7.5, 60.0, 0.5)
    state.take(chunks | {"done": 30, "fraction": 0.55})
    assert calibrate.share == 0.55
    state.take(unit("calibrate", 2, 3))
    assert calibrate.share == 0.75
    state.take(end("calibrate"))
    assert (calibrate.parts, calibrate.share) == ((3, 4, "blocks"), 1.0)


def test_a_lost_worker_is_gone_and_its_block_marked():
    """Until the block's last call begins again; the failure stays in the list."""
    lost = {"event": "lost", "unit": "block 2, finish", "why": "oom", "cause": "died", **B}
    again = {"event": "finishing", "block": 2, "unit": "block 2, finish", **A}
    events = timed(*START, WORKERS, begin("calibrate"), lost)
    state = state_of(events)
    assert list(state.workers) == [("a", 1)]
    assert state.cells["calibrate"] == {2: "lost"}
    for event in ({"event": "quarantined", "node": "b"}, again):
        state.take(event)
    assert state.cells["calibrate"] == {2: "busy"}
    assert state.nodes == {"b": "quarantined"}
    assert [(each["why"], each["run"]) for each in state.failures] == [("oom", 1)]


def test_units_are_counted_for_their_workers():
    """In the present pass of a stage, with a rate from its beginning to the last unit."""
    events = [*START, WORKERS, begin("write"), *(unit("write", n, n + 1, **B) for n in range(3))]
    state = state_of(timed(*events, unit("write", 3, 4, **A)))
    assert {who: each.units for who, each in state.workers.items()} == {
        ("a", 1): {"write": 1},
        ("b", 7): {"write": 3},
    }
    begun = state.stages["write"].since
    assert [each.rate("write", begun) for each in state.workers.values()] == [1 / 4, 3 / 3]
    table = live_sections(state, RunFiles(place="run", status={"state": "running"}))["workers"]
    assert '<td class="n">15</td>' in table
    assert '<td class="n">60</td>' in table
    state.take(begin("write"))
    assert [each.units for each in state.workers.values()] == [{}, {}]


def test_many_workers_are_shown_by_node():
    """Their units and rates are added."""
    several = [{"node": "ab"[pid % 2], "pid": pid} for pid in range(MOST_WORKERS + 2)]
    done = [unit("write", 0, n + 1, total=99, **each) for n, each in enumerate(several)]
    events = timed(*START, {"event": "workers", "workers": several}, begin("write"), *done)
    table = live_sections(state_of(events), RunFiles(place="run"))["workers"]
    assert table.count(f"{len(several) // 2} workers") == 2
    assert table.count(f'<td class="n">{len(several) // 2}</td>') == 2


def test_units_of_a_run_have_their_worker(runs):
    """Node and process are in each unit that one worker computed."""
    place = {"node": socket.gethostname(), "pid": os.getpid()}
    events = RunDirectory(Path(runs[0].run_dir)).events()
    units = [event for event in events if event["event"] == "unit"]
    assert {"calibrate", "write"} <= {each["stage"] for each in units}
    assert all(place.items() <= each.items() for each in units)


def test_a_wait_is_shown_until_something_happens():
    """Any later event ends it."""
    waiting = {"event": "waiting", "for": "a worker", "there": "none"}
    state = state_of(timed(*START, waiting))
    assert state.waiting == "a worker; available: none"
    state.take({"event": "note", "text": "there it is"})
    assert state.waiting == ""


def test_equal_events_in_a_row_are_told_once():
    """With their number; a different one between them begins a new entry."""
    note, other = ({"event": "note", "text": text} for text in ("a", "b"))
    told = state_of(timed(note, note, other, note)).told
    assert [(each["text"], each["times"]) for each in told] == [("a", 2), ("b", 1), ("a", 1)]


LOSSES = {"train": [0.8, 0.6], "held_out": [1.0, 0.9, 0.7], "best": 2}


def failed_run():
    """A run that fails in its training, after refinement of two blocks."""
    snapshots = [{"event": "snapshot", "step": s, "train": None, "held_out": 9 - s} for s in (0, 2)]
    return [
        *START,
        begin("calibrate"),
        *(unit("calibrate", block, block + 1) for block in range(4)),
        end("calibrate"),
        begin("refine"),
        unit("refine", 0, 1, 2, losses=LOSSES),
        unit("refine", 1, 2, 2, losses=LOSSES),
        end("refine"),
        begin("train"),
        *snapshots,
        {"event": "run", "state": "failed", "exit_code": 1, "error": "no"},
    ]


def committed(stage, blocks, **fields):
    return {"event": "note", "text": "committed already", "stage": stage, "blocks": blocks}


def test_a_run_that_fails_says_so():
    """Its end, and the stage that it was in."""
    (run,) = state_of(timed(*failed_run())).runs
    assert (run.state, run.exit_code, run.error, run.stage) == ("failed", 1, "no", "train")
    assert run.ended - run.begun == len(failed_run()) - 1


def test_a_resumed_run_continues_with_what_it_announces():
    """Blocks and losses of the run before, as far as they are reused, are shown as such."""
    events = [*failed_run(), *START, begin("calibrate"), committed("calibrate", [0, 1, 2, 3])]
    events += [end("calibrate"), begin("refine")]
    state = state_of(timed(*events))
    assert state.losses.blocks == {}
    assert state.losses.snapshots == []
    state.take(committed("refine", [1]))
    assert state.cells["calibrate"] == dict.fromkeys(range(4), "earlier") == state.cells[CALIBRATED]
    assert state.cells["refine"] == {1: "earlier"}
    expected = BlockLosses(train=(0.8, 0.6), held_out=(1.0, 0.9, 0.7), best=2)
    assert state.losses.blocks == {"refine": {1: expected}}
    state.take({"event": "note", "text": "training goes on", "stage": "train", "step": 0})
    assert [each.step for each in state.losses.snapshots] == [0]
    assert len(state.runs) == 2


def test_a_killed_run_is_lost():
    """A run without an end, before another one."""
    state = state_of(timed(*START, begin("calibrate"), *START))
    assert [run.state for run in state.runs] == ["lost", "running"]
    assert list(state.stages) == ["survey"]


def test_journals_without_events_of_the_run_begin_with_the_survey():
    """As earlier versions wrote them; each survey is the beginning of a run."""
    old = [begin("survey"), end("survey"), begin("calibrate"), unit("calibrate", 0, 1, 1)]
    state = state_of(timed(*old, *old, begin("write")))
    assert len(state.runs) == 2
    assert list(state.stages) == ["survey", "calibrate", "write"]


def test_steps_that_are_repeated_replace_those_before():
    """After a loss of workers the training returns to a snapshot."""
    steps = (0, 2, 4, 2)
    events = [
        {"event": "snapshot", "step": s, "train": 1.0, "held_out": n} for n, s in enumerate(steps)
    ]
    assert state_of(events).losses.snapshots == [
        SnapshotLosses(0, 1.0, 0.0),
        SnapshotLosses(2, 1.0, 3.0),
    ]


def test_losses_of_a_block_are_drawn_while_it_is_trained():
    """Events of an epoch have all losses so far; those of the unit replace them."""
    losses = {"train": [0.8], "held_out": [1.0, 0.9], "best": 1}
    epoch = {"event": "epoch", "stage": "walk", "block": 2, "losses": losses}
    state = state_of(timed(*START, begin("walk"), epoch))
    assert state.losses.blocks == {"walk": {2: BlockLosses((0.8,), (1.0, 0.9), 1)}}
    assert state.cells.get("walk", {}) == {}
    assert "walk: held-out" in live_sections(state, RunFiles(place="run"))["losses"]
    more = {"train": [0.8, 0.7], "held_out": [1.0, 0.9, 0.8], "best": 2}
    state.take(unit("walk", 2, 1, losses=more))
    assert state.losses.blocks == {"walk": {2: BlockLosses((0.8, 0.7), (1.0, 0.9, 0.8), 2)}}


def test_losses_that_are_not_finite_are_not_numbers():
    """A diverged block has NaN in their places."""
    losses = {"train": [math.inf], "held_out": [1.0, "no"], "best": 0}
    (found,) = state_of([unit("refine", 0, 1, losses=losses)]).losses.blocks["refine"].values()
    assert math.isnan(found.train[0])
    assert math.isnan(found.held_out[1])


def test_a_group_of_blocks_is_decomposed_as_one():
    """The unit of a group's first block lights all of them."""
    state = state_of([SURVEYED | {"group": 3}, begin("calibrate"), unit("calibrate", 3, 2)])
    assert state.cells["calibrate"] == {3: "done"}
    state.take(unit("calibrate", 0, 2))
    assert state.cells["calibrate"] == dict.fromkeys(range(4), "done")


KINDS = ["run", "stage", "unit", "progress", "note", "snapshot", "workers", "finishing", "lost"]

KINDS += ["epoch", "surveyed", "waiting", "draining", "quarantined", "other"]
NAMES = ["event", "stage", "state", "done", "total", "unit", "block", "blocks", "time", "losses"]
NAMES += ["node", "pid", "workers", "step", "held_out", "train", "stages", "memory", "text", "left"]
NAMES += ["error", "exit_code", "group", "of", "deadline", "times", "seconds", "busy"]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["begin", "end", "block 1", "block 3, finish", "calibrate", 10**400, 2**40]),
)
VALUES = st.one_of(ODD, st.lists(ODD, max_size=3), st.dictionaries(st.sampled_from(NAMES), ODD))
EVENTS = st.fixed_dictionaries({"event": st.one_of(st.sampled_from(KINDS), ODD)})


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(
            lambda a, b: b | a, EVENTS, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8)
        ),
        max_size=12,
    ),
    VALUES,
)
def test_no_journal_stops_the_page(events, status):
    """Any JSON is a journal and a status of which a page can be made, of limited size."""
    state = state_of([*timed(*START), *events])
    status = status if isinstance(status, dict) else {"memory": status, "state": "running"}
    files = RunFiles(place="/run", status=status, description={"recipe": status})
    sections = live_sections(state, files)
    assert sections["head"]
    assert sum(map(len, sections.values())) < 1000 * MOST_BLOCKS
