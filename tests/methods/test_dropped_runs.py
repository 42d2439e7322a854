"""Runs under one budget that drops, cuts or leaves experts, through the stages after the plan."""

import shutil

import pytest
import torch
from moe.families import BLOCKS, EXPERTS
from pipeline import add_tokenizer, run, token_chunks, write_text
from sharded import HALVES, sharded_logits
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # compressed checkpoints are loaded by transformers
from orchestrator import retarget, verify
from orchestrator.cli.main import main
from orchestrator.errors import InputError
from orchestrator.hf.fewer_experts import fewer_experts
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.architecture import Architecture

SMALL = {"samples": 2, "sequence_length": 32, "shards": 2, "method": "two-sided", "keep": 0.3}


@pytest.fixture(scope="module")
def places(moe_checkpoint, tmp_path_factory):
    """A dense Qwen3-MoE with a tokenizer, and a text."""
    root = tmp_path_factory.mktemp("dropped")
    add_tokenizer(shutil.copytree(moe_checkpoint("qwen3_moe"), root / "dense"))
    write_text(root / "text.txt")
    return root


@pytest.fixture(scope="module")
def rerouted(places):
    """Result of factors and dropped experts, routers without the rows of those."""
    options = {"threshold": {"drop": "reroute"}}
    return run(places / "dense", places / "out", places / "text.txt", **SMALL, options=options)


def dropped_of(plan):
    return {name for name, each in plan.assignments.items() if each.form == "dropped"}


def test_one_budget_drops_and_cuts(rerouted, places):
    """Some experts go, others are cut; shards compute what transformers loads, and `verify` finds
    what the report says."""
    gone, forms = dropped_of(rerouted.plan), rerouted.plan.forms
    assert 0 < len(gone) <= 3 * BLOCKS * (EXPERTS - 2)
    assert "low_rank" in forms
    assert rerouted.report["kept"]["linears"] <= 0.3
    assert verify(rerouted.out, against=places / "dense")["problems"] == []
    chunk = token_chunks(places / "dense", places / "text.txt")[0]
    loaded, info = AutoModelForCausalLM.from_pretrained(rerouted.out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected_BTV = loaded(input_ids=chunk.tokens).logits
    found_BTV = sharded_logits(LazyModel.open(rerouted.out), chunk, HALVES)
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=2e-6)


def test_the_map_shows_dropped_experts(rerouted, tmp_path):
    """A cell of the report's map says so, with the tokens that were routed to the expert."""
    page = tmp_path / "page.html"
    assert main(["report", str(rerouted.out), "--output", str(page)]) == 0
    tokens = rerouted.report["experts"]["tokens"]
    for name in {each.rpartition(".")[0] for each in dropped_of(rerouted.plan)}:
        assert f"{name}: dropped, {tokens[name]:,} tokens" in page.read_text()


def test_later_stages_pass_dropped_experts(rerouted, places, tmp_path):
    """Pivoted, compensated and refined: the same experts are gone, and no problem is found."""
    stages = {"storage": "pivoted", "compensate": "anchored", "refine": "blocks"}
    options = {"refinement": {"epochs": 1, "batches": 1}, "threshold": {"drop": "reroute"}}
    changed = {**stages, "options": options, "keep": 0.35, "executor": "local"}
    result = retarget(rerouted.run_dir, tmp_path / "out", **changed)
    assert dropped_of(result.plan)
    assert verify(result.out, against=places / "dense")["problems"] == []


def test_blocks_of_other_sizes_are_no_dense_model(rerouted):
    """The class has one number of experts; the message says what to do."""
    architecture = Architecture.read(rerouted.out)
    model = architecture.build(torch.float32, stored=10**4)
    modules = {n: each for n, each in model.named_modules() if n.endswith("mlp.experts")}
    first, *_ = modules.values()
    first.numbers = (0,)
    with pytest.raises(InputError, match=r"1 to \d experts, as no dense model has; compress"):
        fewer_experts(architecture, {}, modules)
