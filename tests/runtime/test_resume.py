"""Resumption in another environment; a number of threads stands for any environment."""

import pytest
from pipeline import contents, run, write_llama, write_text
from safetensors.torch import load_file

from orchestrator import evaluate
from orchestrator.errors import StoppedError
from orchestrator.recipe.execution import Execution
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.store.run import RunDirectory

HERE, THERE = {"device": "cpu", "threads": 2}, {"device": "cpu", "threads": 1}


@pytest.fixture
def left(tmp_path):
    """Reused units of four, each of which was made in one of two environments, or not."""
    directory = RunDirectory(tmp_path)

    def left(made, *, allow_mixed=False, is_all=True):
        keys = {n: f"{n:02d}" * 32 for n in range(4)}
        for n, environment in made.items():
            directory.units.begin(keys[n]).commit(environment=environment, facts={"n": n})
        events = []
        workers = WorkerGroup(None, 1, HERE, ("node",), Execution(allow_mixed=allow_mixed))
        monitor = RunMonitor(directory, events.append)
        found = reusable_units(
            directory.units, keys, workers, monitor, stage="calibrate", is_all=is_all
        )
        assert all(facts == {"n": n} for n, facts in found.items())
        notes = [event["text"] for event in events]
        return set(found), notes, monitor.made_elsewhere

    return left


def test_units_of_this_environment_are_reused(left):
    """Units of this environment are reused without a note, and the report mentions no other one."""
    assert left({0: HERE, 2: HERE}) == ({0, 2}, [], [])


def test_units_of_another_release_are_reused(left):
    """The package's version decides no bits: a stage left unfinished by 0.1.0 goes on, silently."""
    was, now = HERE | {"orchestrator": "0.1.0"}, HERE | {"orchestrator": "0.2.0"}
    assert left({0: was, 1: was, 2: now}) == ({0, 1, 2}, [], [])
    found, (note,), _ = left({0: was | {"threads": 1}})
    assert found == {1, 2}
    assert note.startswith("1 of 4 units of calibrate was made with threads 1 (here 2): made again")


def test_a_stage_that_is_complete_elsewhere_is_taken_as_it_is(left):
    """A complete stage of another environment is reused, with a note."""
    found, (note,), elsewhere = left(dict.fromkeys(range(4), THERE))
    assert found == {0, 1, 2, 3}
    assert note.startswith("4 of 4 units of calibrate were made with threads 1 (here 2): reused")
    assert elsewhere == [{"stage": "calibrate", "units": 4, "environment": THERE}]


@pytest.mark.parametrize(
    "made",
    [
        {0: THERE, 1: THERE, 3: THERE},
        {0: THERE, 1: THERE, 2: HERE, 3: THERE},
        {0: THERE, 1: THERE, 2: THERE | {"device": "cuda"}, 3: THERE},
    ],
)
def test_a_stage_left_unfinished_elsewhere_is_made_again_whole(left, made):
    """An incomplete stage of another environment is made again, unless --allow-mixed is given."""
    here = {n for n, environment in made.items() if environment == HERE}
    found, (note,), elsewhere = left(made)
    assert (found, elsewhere) == (here, [])
    assert note.endswith("made again, because others are missing; --allow-mixed reuses them")
    found, (note,), elsewhere = left(made, allow_mixed=True)
    assert found == made.keys()
    assert elsewhere[0]["units"] == len(made) - len(here)
    assert "reused; the result is not bit-identical" in note


def test_what_is_only_a_part_of_a_stage_is_never_complete(left):
    """The record of snapshots is one unit, and not judged as complete."""
    made = dict.fromkeys(range(4), THERE)
    assert left(made, is_all=False)[0] == set()
    assert left(made, is_all=False, allow_mixed=True)[0] == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama4") / "dense", blocks=4, hidden=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    """Checkpoint of a run with two threads from the start; not to be changed."""
    return run(llama, tmp_path_factory.mktemp("whole") / "out", text, threads=2).out


def stop_at(stage, done):
    """Interrupt a run like a signal, once so many units of a stage are done."""

    def on_event(event):
        if event.get("stage") == stage and event.get("done") == done:
            raise StoppedError("enough")

    return on_event


def stopped_and_resumed(llama, text, out, stage, done, **fields):
    """Report and notes of a run that is interrupted with one thread and resumed with two."""
    with pytest.raises(StoppedError):
        run(llama, out, text, on_event=stop_at(stage, done), threads=1, shards=4)
    events = []
    result = run(llama, out, text, on_event=events.append, threads=2, shards=4, **fields)
    notes = [event["text"] for event in events if event["event"] == "note"]
    return result.report["timings"], notes


def test_an_unfinished_stage_is_made_again_with_other_threads(llama, text, whole, tmp_path):
    """The bytes equal those of a run with two threads from the start."""
    timings, notes = stopped_and_resumed(llama, text, tmp_path / "out", "calibrate", 2)
    assert "made_elsewhere" not in timings
    assert sum("2 of 4 units of calibrate were made with threads 1" in note for note in notes) == 1
    assert contents(tmp_path / "out") == contents(whole)


def test_a_finished_stage_and_a_mixed_one_are_said_in_the_report(llama, text, whole, tmp_path):
    """Units of another number of threads are reused, with a note; results agree within rounding."""
    expected = load_file(whole / "model.safetensors")
    for name, done, fields in (("all", 4, {}), ("some", 2, {"allow_mixed": True})):
        out = tmp_path / name
        timings, _ = stopped_and_resumed(llama, text, out, "calibrate", done, **fields)
        (made,) = timings["made_elsewhere"]
        assert (made["stage"], made["units"]) == ("calibrate", done)
        assert made["environment"] == timings["environment"] | {"threads": 1}
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all((found[each] - expected[each]).abs().max() < 1e-3 for each in expected)


def test_an_evaluation_says_what_was_scored_elsewhere(llama, text, tmp_path):
    """Half of the scores are made with one thread, the others with two."""
    fields = {"text": str(text), "samples": 4, "sequence_length": 48, "executor": "local"}
    fields |= {"run_dir": tmp_path / "run"}
    with pytest.raises(StoppedError):
        evaluate(llama, on_event=stop_at("evaluate", 2), threads=1, shards=1, **fields)
    report = evaluate(llama, threads=2, shards=1, allow_mixed=True, **fields)
    (made,) = report["made_elsewhere"]
    assert (made["stage"], made["units"]) == ("evaluate", 2)
