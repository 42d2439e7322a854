"""Refinement of blocks as a stage of a run: every form, any workers, killed and resumed."""

import os
import shutil
import signal

import pytest
import torch
from pipeline import contents, run, with_tokenizer
from safetensors import safe_open

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.store.run import RunDirectory

TOKENS = torch.arange(2, 34)[None] * 5 % 96
SHORT = {"refinement": {"epochs": 4, "batches": 4, "learning_rate": 2e-4}}


def refined(llama, out, text, *, options=None, **fields):
    return run(llama, out, text, refine="blocks", options=SHORT | (options or {}), **fields)


@pytest.fixture(scope="module")
def reference_run(llama, text, tmp_path_factory):
    """Run in one process and one shard; not to be changed."""
    return refined(llama, tmp_path_factory.mktemp("reference") / "out", text, shards=1)


@pytest.fixture(scope="module")
def reference(reference_run):
    return contents(reference_run.out)


def test_the_journal_has_the_losses_of_every_block(reference_run):
    """By epoch, held-out ones from the start; the kept state is that of the report."""
    events = list(RunDirectory(reference_run.run_dir).events())
    (surveyed,) = (event for event in events if event["event"] == "surveyed")
    assert surveyed["blocks"] == 4
    begun = [
        event["stage"] for event in events if event.get("state") == "begin" and "stage" in event
    ]
    assert surveyed["stages"] == [name for name in begun if name != "verify"]
    units = [event for event in events if event["event"] == "unit" and event["stage"] == "refine"]
    losses = {event["unit"].removeprefix("block "): event["losses"] for event in units}
    blocks = reference_run.report["refine"]["blocks"]
    assert losses.keys() == blocks.keys()
    for block, entry in blocks.items():
        held_out, best = losses[block]["held_out"], losses[block]["best"]
        assert len(held_out) == len(losses[block]["train"]) + 1
        assert (held_out[0], held_out[best], best) == (
            entry["before"],
            entry["after"],
            entry["best_epoch"],
        )


CASES = {
    "low_rank": {},
    "pivoted": {"storage": "pivoted"},
    "two-sided": {"method": "two-sided"},
    "sparse": {"method": "wanda"},
    "low_rank_sparse": {"method": "cap", "options": {"cap": {"stage2": False}}},
    "shared basis": {"method": "basis-sharing"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_form_is_refined_on_its_support(case, llama, llama2, text, tmp_path):
    """Held-out errors never rise, and some fall; sizes and indices are those without training."""
    fields = CASES[case]
    # two blocks of these forms gain nothing in so few steps
    model = llama if case in ("low_rank", "pivoted") else llama2
    options = {"basis-sharing": {"refit": "never"}} if case == "shared basis" else {}
    options |= fields.get("options", {})
    fields = {name: value for name, value in fields.items() if name != "options"}
    result = refined(model, tmp_path / "out", text, options=options, **fields)
    plain = run(
        model, tmp_path / "plain", text, options=options, run_dir=str(result.run_dir), **fields
    )
    blocks = result.report["refine"]["blocks"]
    assert all(entry["after"] <= entry["before"] for entry in blocks.values())
    assert any(entry["after"] < entry["before"] for entry in blocks.values())
    assert result.plan == plain.plan
    with (
        safe_open(result.out / "model.safetensors", framework="pt") as after,
        safe_open(plain.out / "model.safetensors", framework="pt") as before,
    ):
        assert set(after.keys()) == set(before.keys())
        for name in before.keys():  # noqa: SIM118
            one, other = after.get_tensor(name), before.get_tensor(name)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            if not one.is_floating_point():
                assert torch.equal(one, other)
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_families_are_refined(family, checkpoint, text, tmp_path):
    """Norms, biases and transposed weights have the right names in the file."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = refined(model, tmp_path / "out", text, shards=2)
    blocks = result.report["refine"]["blocks"]
    assert any(entry["after"] < entry["before"] for entry in blocks.values())
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("shards", [2, 4])
def test_the_cut_changes_no_bit(shards, llama, text, reference, tmp_path):
    """A block's training depends only on its inputs, for any cut of the model."""
    refined(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
def test_killed_actors_change_no_bit(llama, text, reference, tmp_path, ray_workers):
    """An actor killed after the first refined block: another trains its blocks, bit for bit."""
    pids, killed = [], []

    def kill(event):
        if event["event"] == "workers":
            pids[:] = [worker["pid"] for worker in event["workers"]]
        if event["event"] == "unit" and event["stage"] == "refine" and not killed:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    fields = {"executor": "ray", "workers": 2, "shards": 4, "on_event": kill}
    refined(llama, tmp_path / "out", text, **fields)
    assert killed
    assert contents(tmp_path / "out") == reference


def test_refined_blocks_are_not_trained_again(llama, text, reference, reference_run, tmp_path):
    """A resumed run has its units; other options train again."""
    run_dir = str(shutil.copytree(reference_run.run_dir, tmp_path / "run"))
    events = []
    refined(llama, tmp_path / "two", text, run_dir=run_dir, on_event=events.append)
    assert not any(e["event"] == "unit" and e["stage"] == "refine" for e in events)
    assert reference == contents(tmp_path / "two")
    shorter = {"refinement": SHORT["refinement"] | {"epochs": 1}}
    refined(
        llama, tmp_path / "three", text, run_dir=run_dir, options=shorter, on_event=events.append
    )
    trained = [e for e in events if e["event"] == "unit" and e["stage"] == "refine"]
    assert len(trained) == 4


def test_what_cannot_be_refined_is_refused_at_once(llama, text, tmp_path):
    """Unknown options, values out of range, and a simultaneous refit, each in one line."""
    for options, message in (
        ({"refinement": {"epoch": 3}}, "epochs"),
        ({"refinement": {"epochs": 0}}, "refinement: epochs"),
        ({"refinement": {"slices": 2}}, "refinement: slices is given"),
        ({"svd-llm": {"refit": "always"}}, "give refit 'never'"),
    ):
        with pytest.raises(UsageError, match=message):
            run(llama, tmp_path / "out", text, refine="blocks", options=options)
    assert not (tmp_path / "out.run").exists()
