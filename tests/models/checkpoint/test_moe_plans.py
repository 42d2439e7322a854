"""Checkpoints of mixtures of experts, from the plan to stock transformers: all nine families."""

import json
from functools import cache

import pytest
import torch
from compressed import (
    close_to,
    compress,
    dense_reference,
    logits,
    mixed_plan,
    plan_of,
    with_experts,
)
from moe.families import MOE_FAMILIES
from moe.stored import assert_same
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.hf.export import export_dense
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.plan import Assignment

MODULE = "model.layers.0.mlp.experts"


def every_form_plan(survey):
    """Plan every form; a gate of one output stays dense."""
    found = mixed_plan(survey).assignments
    narrow = {linear.name for linear in survey.linears if linear.out_features == 1}
    dense = dict.fromkeys(narrow, Assignment(form="dense"))
    return plan_of(survey, {**found, **dense})


def attention_plan(survey):
    """Plan low rank for queries and keys, or what a family has of them."""
    assignments = {
        linear.name: Assignment(form="low_rank", rank=5)
        for linear in survey.linears
        if linear.role.endswith(("q_proj", "k_proj", "kv_b_proj"))
    }
    return plan_of(survey, assignments)


def first_expert_plan(survey):
    """Plan low rank for one linear of one expert."""
    return plan_of(survey, {f"{MODULE}.2.down": Assignment(form="low_rank", rank=3)})


PLANS = {"every form": every_form_plan, "attention": attention_plan, "one": first_expert_plan}


@pytest.fixture(scope="module")
def made_of(moe_checkpoint, tmp_path_factory):
    """A family's checkpoint by a plan, in several files; not to be changed."""
    root = tmp_path_factory.mktemp("moe")

    @cache
    def make(family, plan):
        directory = root / f"{family} {plan}"
        sizes = {"make_plan": PLANS[plan], "max_shard_bytes": 40_000}
        return compress(moe_checkpoint(family), directory, **sizes)

    return make


def tensors_of(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_form_computes_the_same_as_its_dense_weight(made_of, family):
    """Logits are those of the dense model with the weights replaced, and no key is left over."""
    made = made_of(family, "every form")
    assert len(made.files) > 1
    model, info = AutoModelForCausalLM.from_pretrained(made.directory, output_loading_info=True)
    assert not any(info.values())
    reference = logits(dense_reference(made))
    # states of linear attention add up rounding
    factor = 10 if family == "qwen3_next" else 1
    tolerance = factor * close_to(reference)["atol"]
    torch.testing.assert_close(logits(model), reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe", "gpt_oss"])
def test_experts_that_are_not_compressed_are_copied(made_of, moe_checkpoint, tmp_path, family):
    """They have the names, shapes and bits on disk of the dense checkpoint, for every program that
    loads it, and saving keeps them; the format is the first one."""
    made = made_of(family, "attention")
    dense, found = tensors_of(moe_checkpoint(family)), tensors_of(made.directory)
    experts = [name for name in dense if ".experts." in name or "put_linear" in name]
    assert experts
    for name in experts:
        assert torch.equal(found[name], dense[name]), name
    config = json.loads((made.directory / "config.json").read_bytes())["quantization_config"]
    assert config["format_version"] == 1
    assert not [name for name in config["modules_to_not_convert"] if ".experts." in name]
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    reference = logits(dense_reference(made))
    torch.testing.assert_close(logits(model), reference, **close_to(reference))
    model.save_pretrained(tmp_path)
    assert set(experts) <= tensors_of(tmp_path).keys()


def test_one_compressed_linear_makes_all_experts_modules(made_of):
    """Experts of all blocks have modules, with a guard in each; the config names every module."""
    made = made_of("qwen3_moe", "one")
    forms = json.loads((made.directory / "config.json").read_bytes())["quantization_config"]
    assert forms["format_version"] == 2
    others = {MODULE.replace("0", str(block)): {} for block in (1, 2, 3)}
    down = {"form": "low_rank", "rank": [0, 0, 3, 0]}
    assert forms["experts"] == {MODULE: {"down": down}, **others}
    assert forms["modules"] == {}
    found = tensors_of(made.directory)
    for module in forms["experts"]:
        expected = torch.zeros(3, 4, dtype=torch.int32)
        expected[2, 2] = 3 if module == MODULE else 0
        assert torch.equal(found[f"{module}.gate_up_proj"], expected)
        assert found[f"{module}.3.up.weight"].shape == (24, 32)
    assert found[f"{MODULE}.2.down.weight"].shape == (32, 3)
    assert not [name for name in found if name.endswith(("up_proj.weight", "gate_proj.weight"))]


@pytest.mark.parametrize("plan", ["every form", "attention"])
def test_shards_of_the_checkpoint_compute_the_same(made_of, plan):
    """The written and the planned checkpoint have the logits of stock transformers."""
    made = made_of("qwen3_moe", plan)
    tokens_BT = torch.arange(3, 23)[None] * 3 % 96
    chunk = Chunk(0, tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    stored = tensors_of(made.directory)
    dense = LazyModel.open(made.dense)

    def read(spec):
        if spec.part == "copy":
            return dense.weights.read(spec.source)
        return stored[spec.name]

    for lazy_model in (LazyModel.open(made.directory), dense.planned(made.plan, read)):
        with lazy_model.shard(range(2)) as shard:
            passed = shard.forward(chunk)
        with lazy_model.shard(range(2, 4)) as shard:
            assert_same(shard.logits(passed), logits(model))


EXPORTED = [(family, "every form") for family in MOE_FAMILIES]
EXPORTED += [("mixtral", "attention"), ("gpt_oss", "attention")]


@pytest.mark.parametrize(("family", "plan"), EXPORTED)
def test_a_dense_export_is_stored_as_the_dense_model(
    made_of, moe_checkpoint, tmp_path, family, plan
):
    """Names, shapes and dtypes on disk are the dense model's, and the products its weights."""
    made = made_of(family, plan)
    export_dense(made.directory, tmp_path / "export")
    dense, found = tensors_of(moe_checkpoint(family)), tensors_of(tmp_path / "export")
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: (each.shape, each.dtype) for name, each in dense.items()
    }
    reference = dense_reference(made).state_dict()
    model = with_experts(tmp_path / "export")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-5, atol=1e-6, msg=name)
    config = json.loads((tmp_path / "export/config.json").read_bytes())
    assert config == json.loads((moe_checkpoint(family) / "config.json").read_bytes())


def test_an_export_never_holds_all_experts(made_of, monkeypatch):
    """A tensor of all experts is written expert by expert: no larger tensor is made."""
    made = made_of("gpt_oss", "every form")
    sizes = []
    empty = torch.empty

    def record(*sizes_, **options):
        made_tensor = empty(*sizes_, **options)
        if not made_tensor.is_meta:
            sizes.append(made_tensor.numel())
        return made_tensor

    monkeypatch.setattr(torch, "empty", record)
    export_dense(made.directory, made.directory.parent / "export")
    vocabulary, hidden, inner = 96, 32, 48
    assert max(sizes) == max(vocabulary * hidden, 2 * inner * hidden)
