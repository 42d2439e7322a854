"""Training of the whole model as a stage of a run: every form, any workers, killed and resumed."""

import os
import shutil
import signal
from functools import cache

import pytest
import torch
from pipeline import contents, run, with_tokenizer
from pools import several
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import StoppedError, UsageError
from orchestrator.stages.context.pipeline import shard as pipeline_shard
from orchestrator.store.run import RunDirectory

TOKENS = torch.arange(2, 34)[None] * 5 % 96
SHORT = {"epochs": 2, "batches": 3, "every": 2, "learning_rate": 2e-4, "top_k": 24}


def trained(model, out, text, *, training=None, options=None, mode="all", **fields):
    options = {"training": SHORT | (training or {})} | (options or {})
    return run(model, out, text, train=mode, options=options, **fields)


@pytest.fixture(scope="module")
def reference_run(llama, text, tmp_path_factory):
    """Run in one process and one shard; not to be changed."""
    return trained(llama, tmp_path_factory.mktemp("reference") / "out", text, shards=1)


@pytest.fixture(scope="module")
def reference(reference_run):
    return contents(reference_run.out)


@pytest.fixture(scope="module")
def recomputed(llama, text, tmp_path_factory):
    """Run in one process with targets that are recomputed; not to be changed."""
    out = tmp_path_factory.mktemp("recomputed") / "out"
    return trained(llama, out, text, training={"targets": "recomputed"})


CASES = {
    "low_rank": {},
    "affine": {"method": "bolaco"},
    "pivoted": {"storage": "pivoted"},
    "sparse": {"method": "wanda"},
    "low_rank_sparse": {"method": "cap", "options": {"cap": {"stage2": False}}},
    "shared basis": {
        "method": "basis-sharing",
        "options": {"basis-sharing": {"refit": "never"}},
    },
}


@pytest.fixture(scope="module")
def untrained(llama, llama2, text, tmp_path_factory):
    """Model and result of a case without training; the run directory is to be copied."""

    def make(case):
        # two groups of blocks, so that each shard has one
        model = llama if case == "shared basis" else llama2
        return model, run(model, tmp_path_factory.mktemp("plain") / "out", text, **CASES[case])

    return cache(make)


@pytest.mark.parametrize("mode", ["all", "light"])
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_trained_on_its_support(case, mode, untrained, text, tmp_path, monkeypatch):
    """The held-out loss of the kept state never rises; sizes and indices are those without
    training."""
    several(monkeypatch, size=2)
    model, plain = untrained(case)
    fields = {"run_dir": str(shutil.copytree(plain.run_dir, tmp_path / "run"))}
    result = trained(model, tmp_path / "out", text, mode=mode, **(CASES[case] | fields))
    report = result.report["train"]
    losses = {each["step"]: each["held_out"] for each in report["snapshots"]}
    assert list(losses) == [0, 2, 4, 6]
    assert losses[report["best_step"]] == min(losses.values())
    assert result.plan == plain.plan
    after, before = (load_file(each.out / "model.safetensors") for each in (result, plain))
    assert after.keys() == before.keys()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert bool(changed) == (report["best_step"] > 0)
    for name, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[name].shape, after[name].dtype)
    assert all(after[name].is_floating_point() for name in changed)
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_families_are_trained(family, checkpoint, text, tmp_path, monkeypatch):
    """Norms, biases and transposed weights have the right names in the file; two shards."""
    several(monkeypatch, size=2)
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = trained(model, tmp_path / "out", text, mode="lean")
    report = result.report["train"]
    assert report["snapshots"][-1]["train"] < report["snapshots"][1]["train"]
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("targets", ["stored", "recomputed"])
def test_training_lowers_the_loss(targets, llama2, text, tmp_path):
    """On the training text, and on the held-out part."""
    training = {"epochs": 4, "batches": 7, "every": 7, "targets": targets, "cross_entropy": 1e-3}
    result = trained(llama2, tmp_path / "out", text, training=training, samples=32, keep=0.2)
    report = result.report["train"]
    snapshots = report["snapshots"]
    assert snapshots[-1]["train"] < 0.95 * snapshots[1]["train"]
    assert snapshots[-1]["step"] == report["best_step"] == 28
    assert snapshots[-1]["held_out"] < 0.97 * snapshots[0]["held_out"]


def test_stored_and_recomputed_targets_agree(recomputed, llama, text, tmp_path):
    """With the whole vocabulary stored they are equal, to rounding."""
    stored = trained(llama, tmp_path / "out", text, training={"top_k": 96})
    snapshots = (each.report["train"]["snapshots"] for each in (stored, recomputed))
    for one, other in zip(*snapshots, strict=True):
        assert one["held_out"] == pytest.approx(other["held_out"], rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_number_of_workers_changes_no_bit(size, llama, text, reference, tmp_path, monkeypatch):
    """Nor does the cut that follows from it, for any other options of the recipe."""
    several(monkeypatch, size=size)
    trained(llama, tmp_path / "out", text, shards=2)
    assert contents(tmp_path / "out") == reference


@pytest.mark.parametrize("replaces", [True, False])
def test_lost_workers_change_no_bit(replaces, llama, text, reference, tmp_path, monkeypatch):
    """Lost in any pass, one after the other, replaced or not until one is left."""
    several(monkeypatch, size=4, losses=(9, 23, 50, 51, 90), replaces=replaces)
    events = []
    trained(llama, tmp_path / "out", text, on_event=events.append)
    assert sum(event["event"] == "lost" for event in events) >= 3
    assert contents(tmp_path / "out") == reference


def test_recomputed_targets_take_no_other_path(recomputed, llama, text, tmp_path, monkeypatch):
    """Both models' chunks pass together, for any number of workers, bit for bit."""
    several(monkeypatch, size=3)
    trained(llama, tmp_path / "three", text, training={"targets": "recomputed"})
    assert contents(recomputed.out) == contents(tmp_path / "three")


def test_a_stopped_run_goes_on_from_its_snapshot(llama, text, reference, tmp_path):
    """Stopped before, at and after snapshots: only the steps after the last one are repeated, and
    the bits equal those of an uninterrupted run."""
    out, begun = tmp_path / "out", []

    def stop_at(step):
        steps = []

        def on_event(event):
            if event["event"] == "unit" and event["stage"] == "train":
                steps.append(event["done"])
                if len(steps) == 1:
                    begun.append(event["done"])
                if event["done"] == step:
                    raise StoppedError("enough")

        return on_event

    for step in (1, 3, 6):
        with pytest.raises(StoppedError):
            trained(llama, out, text, on_event=stop_at(step))
    trained(llama, out, text, on_event=stop_at(None))
    # snapshots are made at steps 0, 2, 4 and 6, after the event of the step
    assert begun == [1, 1, 3, 5]
    assert contents(out) == reference


def test_snapshots_go_when_they_are_neither_last_nor_best(llama2, text, tmp_path):
    """At most three snapshots exist at any time, and none at the end."""
    run_dir, most = RunDirectory(tmp_path / "out.run"), []

    def states():
        return list(run_dir.units.root.rglob(pipeline_shard.FILE))

    def count(event):
        if event["event"] in ("unit", "snapshot"):
            most.append(len(states()))

    training = {"epochs": 4, "every": 1, "patience": 100}
    trained(llama2, tmp_path / "out", text, training=training, on_event=count)
    assert 2 <= max(most) <= 3 * 2  # of two blocks
    assert states() == []


def test_trained_blocks_are_not_trained_again(llama, text, reference, reference_run, tmp_path):
    """A resumed run has its units; other options train again, from the same targets."""
    run_dir = str(shutil.copytree(reference_run.run_dir, tmp_path / "run"))
    events = []
    trained(llama, tmp_path / "two", text, run_dir=run_dir, on_event=events.append)
    assert not any(e["event"] == "unit" and e["stage"] == "train" for e in events)
    assert reference == contents(tmp_path / "two")
    targets = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("targets.*")}
    longer = {"epochs": 3}
    trained(
        llama, tmp_path / "three", text, run_dir=run_dir, training=longer, on_event=events.append
    )
    steps = [e for e in events if e["event"] == "unit" and e["stage"] == "train"]
    assert len(steps) == 9
    assert targets == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("targets.*")}


def test_it_starts_from_what_refinement_has_left(llama2, text, tmp_path):
    """The initial held-out loss is lower if blocks were refined before."""
    refinement = {"refinement": {"epochs": 8, "batches": 4, "learning_rate": 1e-3}}
    shared = {"samples": 12, "training": {"epochs": 1}, "run_dir": str(tmp_path / "run")}
    alone, refined = (
        trained(llama2, tmp_path / refine, text, refine=refine, options=options, **shared)
        for refine, options in (("none", {}), ("blocks", refinement))
    )
    one, other = (each.report["train"]["snapshots"][0]["divergence"] for each in (alone, refined))
    assert other < one


@pytest.mark.ray
def test_two_actors_are_one_process(llama, text, reference, tmp_path, ray_workers):
    """Chunks and gradients are sent from actor to actor, and no bit changes."""
    trained(llama, tmp_path / "out", text, executor="ray", workers=2)
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
def test_killed_actors_change_no_bit(llama, text, reference, tmp_path, ray_workers):
    """An actor killed in the middle of a period: all go back to the last snapshot."""
    pids, killed = [], []

    def kill(event):
        if event["event"] == "workers":
            pids[:] = [worker["pid"] for worker in event["workers"]] + pids
        done = event.get("done") if event.get("stage") == "train" else None
        if event["event"] == "unit" and done == 3 and not killed:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    events = []

    def on_event(event):
        events.append(event)
        kill(event)

    trained(llama, tmp_path / "out", text, executor="ray", workers=2, on_event=on_event)
    assert killed
    assert any(event["event"] == "lost" for event in events)
    assert contents(tmp_path / "out") == reference


def test_where_nothing_is_cut_nothing_is_trained(llama2, text, tmp_path):
    """All linears dense: no step, no target, and the dense model's values."""
    result = trained(llama2, tmp_path / "out", text, keep=1.0)
    assert result.report["train"]["steps"] == 0
    assert result.report["train"]["snapshots"] == []
    assert not list((tmp_path / "out.run").rglob("targets.*"))


def test_one_sequence_is_not_enough(llama, text, tmp_path):
    """At least one sequence must be held out."""
    with pytest.raises(UsageError, match="there is 1 sequence; two are needed"):
        trained(llama, tmp_path / "out", text, samples=1)


def test_what_cannot_be_trained_is_refused_at_once(llama, text, tmp_path):
    """Unknown options, values out of range, and a simultaneous refit, each in one line."""
    for options, message in (
        ({"training": {"epoch": 3}}, "epochs"),
        ({"training": {"every": 0}}, "training: every"),
        ({"training": {"divergence": 0}}, "one must be above"),
        ({"training": {"targets": "dense"}}, "recomputed, stored"),
        ({"svd-llm": {"refit": "always"}}, "give refit 'never'"),
    ):
        with pytest.raises(UsageError, match=message):
            run(llama, tmp_path / "out", text, train="all", options=options)
    with pytest.raises(UsageError, match="all, lean, light, none"):
        run(llama, tmp_path / "out", text, train="some")
    assert not (tmp_path / "out.run").exists()
