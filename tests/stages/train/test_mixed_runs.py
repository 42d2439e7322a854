"""Mixed training as a part of a run: the same bits from any workers, and the loss of its start."""

import pytest
import torch
from pipeline import contents, run, token_chunks
from pools import several
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.errors import StoppedError, UsageError
from orchestrator.linalg.sparsity.pruned_low_rank import masked
from orchestrator.models.training.train_options import TrainOptions, plan_course
from orchestrator.randomness import Randomness
from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import resolve

SHORT = {"epochs": 2, "batches": 3, "every": 1, "learning_rate": 2e-4, "top_k": 96, "mixed": 0.5}


def trained(model, out, text, *, training=None, **fields):
    options = {"training": SHORT | (training or {})}
    return run(model, out, text, train="all", options=options, **fields)


@pytest.fixture(scope="module")
def reference(llama3, text, tmp_path_factory):
    """Run of a pruned model in one process and one shard; not to be changed."""
    return trained(llama3, tmp_path_factory.mktemp("mixed") / "out", text, method="lpaf", shards=1)


def losses(result, what):
    return [each[what] for each in result.report["train"]["snapshots"]]


def divergence(theirs, ours):
    """Mean KL over the tokens of some pairs of logits [T, V]."""
    pairs = [(p.log_softmax(-1), q.log_softmax(-1)) for p, q in zip(theirs, ours, strict=True)]
    return float(torch.cat([(p.exp() * (p - q)).sum(dim=-1) for p, q in pairs]).mean())


def test_the_first_step_has_the_loss_of_the_pruned_model(reference, llama3, text):
    """The KL of the dense model to that with M ∘ W, which transformers computes with the masks of
    the run, on the sequences of the step; the held-out loss is that of factors from the start."""
    course = plan_course(TrainOptions(**SHORT), 6, Randomness(0))
    chunks = token_chunks(llama3, text)
    dense, pruned = (AutoModelForCausalLM.from_pretrained(llama3) for _ in range(2))
    for path in reference.run_dir.rglob("units/**/*_proj.safetensors"):
        weight = pruned.get_submodule(path.name.removesuffix(".safetensors")).weight
        weight.data = masked(weight.data, load_file(path)["mask"])
    with torch.no_grad():
        both = [
            [model(chunks[index].tokens).logits[0].double() for index in course.batches[0]]
            for model in (dense, pruned)
        ]
    expected = divergence(*both)
    assert losses(reference, "train")[1] == pytest.approx(expected, rel=1e-4)
    assert abs(losses(reference, "held_out")[0] / expected - 1) > 0.01
    assert "the course of the mixed steps" in reference.report["train"]["reconstruction"]


def test_nothing_is_lost_in_the_first_step_of_another_method(llama3, text, tmp_path):
    """Its decomposed weight is the dense one: divergence 0 to rounding, then above."""
    result = trained(llama3, tmp_path / "out", text, training={"epochs": 1}, samples=4)
    first, second = losses(result, "train")[1:3]
    assert abs(first) < 1e-6
    assert second > 1e-4


@pytest.mark.parametrize("losses", [(), (4, 60)])
def test_no_worker_changes_a_byte(losses, reference, llama3, text, tmp_path, monkeypatch):
    """Three shards of a block each, or fewer after losses, against one shard."""
    several(monkeypatch, size=3, losses=losses, replaces=False)
    trained(llama3, tmp_path / "out", text, method="lpaf")
    assert contents(tmp_path / "out") == contents(reference.out)


def test_a_stopped_run_goes_on(reference, llama3, text, tmp_path):
    """Stopped within the mixed steps: the rest has the draws that it would have had."""

    def stop(event):
        if event["event"] == "unit" and event["stage"] == "train" and event["done"] == 2:
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        trained(llama3, tmp_path / "out", text, method="lpaf", on_event=stop)
    trained(llama3, tmp_path / "out", text, method="lpaf")
    assert contents(tmp_path / "out") == contents(reference.out)


def test_recomputed_targets_share_the_dense_weights(llama3, text, tmp_path, monkeypatch):
    """On two shards, whose dense shards are open alongside: the first step loses nothing."""
    several(monkeypatch, size=2)
    training = {"targets": "recomputed", "epochs": 1}
    result = trained(llama3, tmp_path / "out", text, training=training, samples=4)
    assert abs(losses(result, "train")[1]) < 1e-6


def test_what_cannot_be_mixed_is_refused_at_once():
    """Linears without a form to turn to, and fractions outside of [0, 1]."""
    given = {"model": "dense", "out": "out", "keep": 0.5, "calibration": "text", "train": "all"}
    for method, mixed, message in (
        ("reap", 0.5, r"training\.mixed is 0\.5 and reap leaves linears that are dropped"),
        ("lpaf", 1.5, r"training: mixed is 1\.5"),
    ):
        fields = {**given, "method": method, "options": {"training": {"mixed": mixed}}}
        with pytest.raises(UsageError, match=message):
            resolve(make_recipe(fields))
