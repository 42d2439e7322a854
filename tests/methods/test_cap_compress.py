"""CAP from model to checkpoint: masks, budgets, workers and sizes."""

import numpy as np
import pytest
import torch
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from pools import several
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import StoppedError, UsageError
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.codecs import CODECS


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=3, hidden=32)


OPTIONS = {"buckets": 8, "samples": 2, "chunks": 2}


def compress_cap(model, out, text, options=None, **fields):
    options = {"cap": OPTIONS | (options or {})}
    return run(model, out, text, method="cap", options=options, **fields)


@pytest.fixture(scope="module")
def half(llama, text, tmp_path_factory):
    """Result in one process, cut into two shards; not to be changed."""
    return compress_cap(llama, tmp_path_factory.mktemp("half") / "out", text, shards=2)


@pytest.fixture(scope="module")
def reference(half):
    return contents(half.out)


TOKENS = torch.arange(2, 34)[None] * 5 % 96


def test_a_checkpoint_is_written_and_loads(half, llama, text):
    """At most half of the values; the loaded model is the one of the last loss."""
    values, report = half.report["values"], half.report["cap"]
    assert values["stored"] <= values["budget"] == values["dense_linears"] // 2
    assert values["slack"] == 0
    kept = report["kept"]
    assert kept["direction_values"] + kept["entries"] == values["stored"]
    loaded = orchestrator.load(half.out).eval()
    tokenizer = load_tokenizer(llama)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][: 2 * 48]).view(2, 48)
    with torch.no_grad():
        losses = [loaded(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    taken = {"stage 2": "stage2_loss", "initialisation": "initialisation_loss"}[report["taken"]]
    assert np.mean(losses) == pytest.approx(report[taken], rel=1e-4)
    assert report["stage2_loss"] < report["initialisation_loss"] or taken != "stage2_loss"
    for entry in half.report["linears"].values():
        assert {"iterations", "residual", "rank", "density"} <= entry["numerics"].keys()


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (2, 3)])
def test_cut_and_workers_change_no_bit(
    workers, shards, llama, text, reference, tmp_path, monkeypatch
):
    """For any cut of the masked passes, and with workers that share no object, the output is
    byte-identical; so is a second run."""
    several(monkeypatch, size=workers)
    compress_cap(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
def test_two_actors_change_no_bit(llama, text, reference, tmp_path, ray_address):
    """With 2 Ray actors the output is that of one process without Ray.

    The one run on Ray of the methods with passes of their own: CAP depends most on its processes.
    Each actor draws its masks from the seed and reads the probabilities from the run directory,
    chunks of several masked models cross from actor to actor, and every step returns counts for the
    driver's learning. Sensitivities, refits and two-sided statistics are shown by workers in one
    process whose calls cross a pickle.
    """
    compress_cap(llama, tmp_path / "out", text, executor="ray", workers=2, shards=2)
    assert contents(tmp_path / "out") == reference


def test_losses_are_not_evaluated_twice(llama, text, reference, tmp_path):
    """A run stopped after some losses continues from them, to the same bytes."""
    lost = []

    def stop(event):
        if event["event"] == "unit" and event["stage"] == "score":
            lost.append(event)
            if len(lost) == 4:
                raise StoppedError("here")

    with pytest.raises(StoppedError):
        compress_cap(llama, tmp_path / "out", text, shards=2, on_event=stop)
    events = []
    compress_cap(llama, tmp_path / "out", text, shards=2, on_event=events.append)
    assert contents(tmp_path / "out") == reference
    units = [e for e in events if e["event"] == "unit" and e["stage"] == "score"]
    assert len(units) == 8 - 4


def test_without_its_second_stage_no_loss_is_evaluated(llama, text, run_dir, tmp_path):
    """The initialisation alone is the greedy choice by utility, from the same run directory."""
    events = []
    first = compress_cap(
        llama, tmp_path / "first", text, {"stage2": False}, run_dir=run_dir, on_event=events.append
    )
    assert not any(e["event"] == "unit" and e["stage"] in ("calibrate", "score") for e in events)
    assert first.report["cap"]["stage2"] is False
    none = compress_cap(llama, tmp_path / "none", text, {"iterations": 0}, run_dir=run_dir)
    assert none.plan == first.plan


def test_another_size_needs_no_second_decomposition(llama, text, run_dir, tmp_path):
    """A second size chosen from a run directory has the bytes of a direct run."""
    events = []
    fields = {"keep": 0.7, "run_dir": run_dir, "on_event": events.append}
    compress_cap(llama, tmp_path / "more", text, **fields)
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)
    compress_cap(llama, tmp_path / "direct", text, keep=0.7)
    assert contents(tmp_path / "more") == contents(tmp_path / "direct")


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.2])
def test_every_budget_is_met(keep, llama, text, run_dir, tmp_path):
    """Budgets are met from below; with linears that stay dense, the rest is spent to the last
    value."""
    options = {"stage2": False, "across": "absolute"}
    result = compress_cap(llama, tmp_path / "out", text, options, keep=keep, run_dir=run_dir)
    values = result.report["values"]
    assert values["stored"] <= values["budget"]
    forms = {entry["form"] for entry in result.report["linears"].values()}
    assert ("dense" in forms) == (keep >= 0.9)
    if keep == 1.0:
        dense = AutoModelForCausalLM.from_pretrained(llama)
        ours = orchestrator.load(result.out)
        assert torch.equal(ours(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits)


def test_a_budget_in_bytes_is_met(llama, text, run_dir, tmp_path):
    """Including indices, at most the given bytes are stored, and almost all of them."""
    fields = {"keep": None, "keep_bytes": 0.6, "run_dir": run_dir}
    result = compress_cap(llama, tmp_path / "out", text, {"iterations": 1}, **fields)
    lazy_model = LazyModel.open(llama)
    linears = lazy_model.survey().linears
    stored = sum(
        result.plan.assignments[each.name].stored_bytes(each, CODECS["float32"]) for each in linears
    )
    dense = 4 * sum(each.values for each in linears)
    assert 0.599 * dense < stored <= 0.6 * dense


@pytest.mark.parametrize("family", ["gpt2", "llama_tied"])
def test_other_families_are_masked_too(family, checkpoint, text, tmp_path):
    """Transposed weights and tied embeddings: the last loss is the loaded model's."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    options = {"iterations": 1, "samples": 1, "keep_better": False}
    result = compress_cap(model, tmp_path / "out", text, options, keep=0.6)
    loaded = orchestrator.load(result.out).eval()
    ids = torch.tensor(load_tokenizer(model)(text.read_text())["input_ids"][: 2 * 48]).view(2, 48)
    with torch.no_grad():
        losses = [loaded(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert np.mean(losses) == pytest.approx(result.report["cap"]["stage2_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "allocation", "said"),
    [
        ("cap", "uniform", "ranks and entries together; it must be one of cap"),
        ("svd-llm", "cap", "divides ranks and entries together"),
        ("wanda", "cap", "divides ranks and entries together"),
    ],
)
def test_its_allocation_needs_its_decomposition(method, allocation, said, llama, text, tmp_path):
    """Its allocation and its decomposition belong together, and the message says so."""
    with pytest.raises(UsageError, match=said):
        run(llama, tmp_path / "out", text, method=method, allocation=allocation)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"buckets": -1}, "whole number"),
        ({"utility": "size"}, "activation, magnitude"),
        ({"solver": "svd"}, "admm_fixed_mu, ialm"),
        ({"bucket": 3}, "near misses"),
    ],
)
def test_the_methods_options_are_checked(options, said, llama, text, tmp_path):
    """Options of method and allocation share one table, and all are known."""
    with pytest.raises(UsageError, match=said):
        compress_cap(llama, tmp_path / "out", text, options)
