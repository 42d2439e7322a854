"""Runs on mixtures of experts: statistics, factors and files of every expert's linears."""

import math
import shutil
from functools import cache

import pytest
import torch
from moe.families import BLOCKS, EXPERTS, MOE_FAMILIES, make_moe
from pipeline import add_tokenizer, contents, run, token_chunks, write_text
from safetensors.torch import load_file
from sharded import HALVES, sharded_logits
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # compressed checkpoints are loaded by transformers
from orchestrator import retarget
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.speed import speed_forecast

SMALL = {"samples": 2, "sequence_length": 24, "shards": 2}
TWO_SIDED = {"method": "two-sided", "options": {"two-sided": {"draws": 2}}}


@pytest.fixture(scope="module")
def moe_text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="module")
def moe_model(moe_checkpoint, tmp_path_factory):
    """A family's checkpoint with a tokenizer; not to be changed."""
    root = tmp_path_factory.mktemp("models")
    return cache(
        lambda family: add_tokenizer(shutil.copytree(moe_checkpoint(family), root / family))
    )


@pytest.fixture(scope="module")
def reference(moe_model, moe_text, tmp_path_factory):
    """Run of Qwen3-MoE with two label draws, in two shards."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return run(moe_model("qwen3_moe"), out, moe_text, shards=2, **TWO_SIDED)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_is_compressed_and_loads(family, moe_model, moe_text, tmp_path):
    """In two shards, to a checkpoint that transformers loads with the logits of its shards."""
    model = moe_model(family)
    result = run(model, tmp_path / "out", moe_text, **SMALL)
    names = [name for name in result.plan.assignments if ".experts." in name]
    assert {result.plan.assignments[name].form for name in names} == {"low_rank"}
    assert len(names) >= 2 * 3 * EXPERTS
    assert result.report["kept"]["linears"] <= 0.5
    chunk = token_chunks(model, moe_text)[0]
    loaded, info = AutoModelForCausalLM.from_pretrained(result.out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected_BTV = loaded(input_ids=chunk.tokens).logits
    found_BTV = sharded_logits(LazyModel.open(result.out), chunk, HALVES)
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=2e-6)


def test_experts_have_ranks_and_token_counts_of_their_own(reference):
    """Each token counts for two experts of a block, once for all label draws."""
    tokens = reference.report["experts"]["tokens"]
    assert len(tokens) == BLOCKS * EXPERTS
    for block in range(BLOCKS):
        names = [f"model.layers.{block}.mlp.experts.{expert}" for expert in range(EXPERTS)]
        assert sum(tokens[name] for name in names) == 2 * 6 * 48
    plan = reference.plan.assignments
    assert len({each.rank for name, each in plan.items() if ".experts." in name}) > 2


def test_an_expert_costs_its_part_of_the_tokens(reference, tmp_path):
    """With two of four experts a token, half of its operations: in the budget, in the report, and
    in the bound of the speed, up to the rounding of each linear."""
    result = retarget(reference.run_dir, tmp_path / "cut", keep_flops=0.5, executor="local")
    operations = result.report["costs"]["operations"]
    dense = 0.0
    for name, entry in result.report["linears"].items():
        assert entry.get("routed", 1) == (0.5 if ".experts." in name else 1)
        dense += math.prod(entry["shape"]) * entry.get("routed", 1)
    assert operations["dense"] == dense
    assert 0.49 * dense < operations["planned"] <= 0.5 * dense
    bound = speed_forecast(result.report)["at_most"]["prefill"]
    assert bound == pytest.approx(dense / operations["planned"], rel=5e-3)


def test_the_errors_are_of_the_routed_tokens(moe_model, moe_text, tmp_path):
    """An expert's `activation_error` is that of its rows times the router's weights, by plain sums
    over the whole model."""
    model = moe_model("qwen3_moe")
    result = run(model, tmp_path / "out", moe_text, samples=6)
    dense = make_moe("qwen3_moe")
    replace_experts(dense)
    experts = dense.model.layers[1].mlp.experts
    seen = {}

    def keep(module, inputs, name):
        rows = inputs[0].double() * experts.routed.weights_N.double()[:, None]
        seen.setdefault(name, []).append(rows)

    for expert in range(EXPERTS):
        for part in ("up", "down"):
            name = f"{expert}.{part}"
            experts.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs, name=name: keep(module, inputs, name)
            )
    with torch.no_grad():
        for chunk in token_chunks(model, moe_text):
            dense(input_ids=chunk.tokens)
    stored = load_file(result.out / "model.safetensors")
    compared = 0
    for name, pieces in seen.items():
        rows, full_name = torch.cat(pieces), f"model.layers.1.mlp.experts.{name}"
        weight = experts.get_submodule(name).weight.detach().double()
        if len(rows) < weight.shape[1]:
            continue
        left, right = (stored[f"{full_name}.{key}"] for key in ("weight", "down.weight"))
        gap = rows @ (weight - left.double() @ right.double()).T
        expected = float(gap.square().sum() / (rows @ weight.T).square().sum())
        reported = result.report["linears"][full_name]["activation_error"]
        assert reported == pytest.approx(expected, rel=1e-4)
        compared += 1
    assert compared >= 4


class Ended(Exception):
    """Exception that stands for the end of a driver."""


def test_a_stopped_run_goes_on_to_the_same_bytes(reference, moe_model, moe_text, tmp_path):
    """After one committed block; in other shards than the run that was not stopped."""

    def end(event):
        if event["event"] == "unit" and event["stage"] == "calibrate":
            raise Ended

    settings = {"shards": 4, **TWO_SIDED}
    with pytest.raises(Ended):
        run(moe_model("qwen3_moe"), tmp_path / "out", moe_text, on_event=end, **settings)
    events = []
    run(moe_model("qwen3_moe"), tmp_path / "out", moe_text, on_event=events.append, **settings)
    units = [each for each in events if each["event"] == "unit" and each["stage"] == "calibrate"]
    assert 0 < len(units) < BLOCKS
    assert contents(tmp_path / "out") == contents(reference.out)


def test_rare_experts_are_warned_of(moe_model, moe_text, tmp_path):
    """A text of 24 tokens leaves experts with fewer than 10; notes and the report say so."""
    events = []
    settings = {"samples": 1, "sequence_length": 24, "shards": 1, "on_event": events.append}
    result = run(moe_model("qwen3_moe"), tmp_path / "out", moe_text, **settings)
    few, short = result.report["experts"]["warnings"]
    assert "experts have fewer than 10 calibration tokens" in few
    assert "fewer calibration tokens than inputs" in short
    notes = [each["text"] for each in events if each["event"] == "note"]
    assert {f"warning: {few}", f"warning: {short}"} <= set(notes)


def test_experts_are_compensated(moe_model, moe_text, tmp_path):
    """Experts with more tokens than inputs are fitted to the inputs of the compressed model."""
    settings = {"compensate": "anchored", "keep": 0.7, "target": ("*.layers.[01].*",)}
    result = run(moe_model("olmoe"), tmp_path / "out", moe_text, **settings)
    blocks = result.report["walk"]["blocks"].values()
    linears = {name: each for block in blocks for name, each in block["linears"].items()}
    found = [each for name, each in linears.items() if ".experts." in name]
    assert len(found) > 2 * EXPERTS
    # nothing before the first block changes its first linears' inputs, so that some stay
    assert sum(each["taken"] for each in found) > EXPERTS
    assert all(each["after"] <= each["before"] for each in found)
