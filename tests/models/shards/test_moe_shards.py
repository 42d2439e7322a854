"""Survey and shards of mixtures of experts, each matrix of an expert a linear."""

import pytest
import torch
from moe.families import BLOCKS, EXPERTS, MOE_FAMILIES
from sharded import HALVES, padded_chunk, sharded_logits, whole_logits, whole_model

from orchestrator.models.shards.lazy_model import LazyModel

LLAMA4_DIFFERENCE = 5e-7
"""Relative to the largest logit; see `test_experts.py`."""
CASES = [(family, torch.float32) for family in MOE_FAMILIES]
CASES += [(family, torch.bfloat16) for family in ("deepseek_v3", "gpt_oss", "llama4")]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_two_shards_give_the_bits_of_the_whole_model(moe_checkpoint, family, dtype):
    """Logits are those of stock transformers with fused experts; Llama 4 up to 5e-7."""
    model = whole_model(moe_checkpoint(family), dtype)
    lazy_model = LazyModel.open(moe_checkpoint(family), dtype=dtype)
    assert lazy_model.total_parameters == model.num_parameters()
    for padding in ["none", "left"]:
        chunk = padded_chunk(padding)
        expected_BTV = whole_logits(model, chunk)
        found_BTV = sharded_logits(lazy_model, chunk, HALVES)
        if family == "llama4":
            difference = (found_BTV - expected_BTV).abs().max()
            assert difference <= LLAMA4_DIFFERENCE * expected_BTV.abs().max()
        else:
            assert torch.equal(found_BTV, expected_BTV), padding


def test_any_cut_gives_the_same_bits(moe_checkpoint):
    """One shard, and one for each block."""
    chunk = padded_chunk("left")
    lazy_model = LazyModel.open(moe_checkpoint("qwen3_moe"))
    expected_BTV = sharded_logits(lazy_model, chunk, HALVES)
    for cuts in ([range(BLOCKS)], [range(block, block + 1) for block in range(BLOCKS)]):
        assert torch.equal(sharded_logits(lazy_model, chunk, cuts), expected_BTV)


QKVO = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
SHARED = {f"mlp.shared_expert.{name}" for name in MLP}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
OTHERS = {
    "mixtral": (QKVO, "mlp"),
    "qwen3_moe": (QKVO, "mlp"),
    "olmoe": (QKVO, "mlp"),
    "deepseek_v3": (
        {f"self_attn.{name}" for name in LATENT} | {f"mlp.shared_experts.{name}" for name in MLP},
        "mlp",
    ),
    "qwen2_moe": (QKVO | SHARED, "mlp"),
    "qwen3_next": (QKVO | SHARED, "mlp"),
    "granitemoe": (QKVO, "block_sparse_moe"),
    "gpt_oss": (QKVO, "mlp"),
    "llama4": (QKVO | {f"feed_forward.shared_expert.{name}" for name in MLP}, "feed_forward"),
}
"""Linears of block 3 that belong to no single expert, and the parent of the experts."""


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_survey_lists_the_linears_of_experts(moe_checkpoint, family):
    """Each expert has a site for gate and up and one for down; routers and gates are not listed."""
    lazy_model = LazyModel.open(moe_checkpoint(family))
    linears = {linear.role: linear for linear in lazy_model.survey().of_block(3)}
    others, parent = OTHERS[family]
    parts = ("gate", "up", "down")
    experts = [f"{parent}.experts.{e}.{part}" for e in range(EXPERTS) for part in parts]
    assert [role for role in linears if ".experts." in role] == experts
    assert {role for role in linears if ".experts." not in role} == others
    for role in experts:
        found, stem = linears[role], role.rpartition(".")[0]
        first = role if role.endswith("down") else f"{stem}.gate"
        assert found.site == linears[first].name
        assert found.sublayer == f"3.{parent}"
        assert found.has_bias == (family == "gpt_oss")
        assert (found.norm != "") == (not role.endswith("down"))
    blocks = {each.block for each in lazy_model.survey().linears if ".experts." in each.role}
    assert blocks == {"deepseek_v3": {1, 2, 3}, "llama4": {1, 3}}.get(family, {0, 1, 2, 3})


def test_the_tensors_are_those_of_the_linears(moe_checkpoint):
    """Every expert's matrix is listed in its block, and a shard holds those of its blocks."""
    lazy_model = LazyModel.open(moe_checkpoint("granitemoe"))
    names = {each.name for each in lazy_model.tensors() if each.block == 2}
    name = "model.layers.2.block_sparse_moe.experts.1.up.weight"
    assert name in names
    with lazy_model.shard(range(2, 3)) as shard:
        assert names <= shard.parameters().keys()
        model = whole_model(moe_checkpoint("granitemoe"), torch.float32)
        fused = model.get_parameter("model.layers.2.block_sparse_moe.experts.gate_up_proj")
        assert torch.equal(shard.parameters()[name], fused[1, 48:])
