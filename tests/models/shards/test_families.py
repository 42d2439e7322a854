"""Shards of every model family give the bits of the whole model."""

from functools import cache

import pytest
import torch
from families import BLOCKS, FAMILIES
from sharded import HALVES, padded_chunk, sharded_logits, whole_logits, whole_model

from orchestrator.models.shards.lazy_model import LazyModel

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def whole(checkpoint):
    """A family's whole model in float32; not to be changed."""
    return cache(lambda family: whole_model(checkpoint(family), torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_shards_give_the_bits_of_the_whole_model(checkpoint, whole, family, dtype):
    """Without, with right and with left padding, the logits are bit for bit the whole model's."""
    is_narrow = dtype != torch.float32
    model = whole_model(checkpoint(family), dtype) if is_narrow else whole(family)
    lazy_model = LazyModel.open(checkpoint(family), dtype=dtype)
    assert lazy_model.attention == model.config._attn_implementation
    for padding in ["none", "right", "left"]:
        chunk = padded_chunk(padding)
        expected_BTV = whole_logits(model, chunk)
        assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV), padding


@pytest.mark.parametrize(
    "cuts", [[(0, 4)], [(0, 1), (1, 3), (3, 4)], [(i, i + 1) for i in range(4)]]
)
def test_any_cut_gives_the_same_bits(checkpoint, whole, cuts):
    """One shard, three of different sizes, and one per block agree with the whole model."""
    chunk = padded_chunk("left")
    expected_BTV = whole_logits(whole("llama"), chunk)
    lazy_model = LazyModel.open(checkpoint("llama"))
    ranges = [range(*cut) for cut in cuts]
    assert torch.equal(sharded_logits(lazy_model, chunk, ranges), expected_BTV)


LLAMA = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
QUERY_KEY_VALUE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
SITES = {
    **dict.fromkeys(
        ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], LLAMA
    ),
    "phi3": {
        "self_attn.qkv_proj": "self_attn.qkv_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_up_proj": "mlp.gate_up_proj",
        "mlp.down_proj": "mlp.down_proj",
    },
    "gpt2": {role: role for role in ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    "opt": {
        **dict.fromkeys(QUERY_KEY_VALUE, "self_attn.q_proj"),
        **{role: role for role in ["self_attn.out_proj", "fc1", "fc2"]},
    },
    # The MLP reads its own norm of the block's input, parallel to the attention.
    "gpt_neox": {
        role: role
        for role in [
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ]
    },
    # One norm for both.
    "falcon": {
        "self_attention.query_key_value": "self_attention.query_key_value",
        "self_attention.dense": "self_attention.dense",
        "mlp.dense_h_to_4h": "self_attention.query_key_value",
        "mlp.dense_4h_to_h": "mlp.dense_4h_to_h",
    },
}
"""Role of every linear in call order, with the role of the first linear that reads its input."""
BIASED = {
    "qwen2": set(QUERY_KEY_VALUE),
    **{family: set(SITES[family]) for family in ["gpt2", "opt", "gpt_neox"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_survey_lists_linears_and_parameters(checkpoint, whole, family):
    """Linears in call order, their sites, shapes and biases, and the model's parameter count."""
    model = whole(family)
    survey = LazyModel.open(checkpoint(family)).survey()
    assert survey.architecture == type(model).__name__
    assert (survey.num_blocks, survey.dtype) == (BLOCKS, "float32")
    assert survey.total_parameters == model.num_parameters()
    for block in range(BLOCKS):
        linears = survey.of_block(block)
        prefix = linears[0].name.removesuffix(linears[0].role)
        assert {x.role: x.site.removeprefix(prefix) for x in linears} == SITES[family]
        assert [x.role for x in linears] == list(SITES[family])
        assert {x.role for x in linears if x.has_bias} == BIASED.get(family, set())
        for linear in linears:
            module = model.get_submodule(linear.name)
            shape = (linear.out_features, linear.in_features)
            assert tuple(module.weight.shape) == (shape[::-1] if family == "gpt2" else shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_the_stored_ones(checkpoint, whole, family):
    """Every stored tensor is listed once, with its block, in the order front, blocks, tail."""
    model = whole(family)
    lazy_model = LazyModel.open(checkpoint(family))
    tensors = lazy_model.tensors()
    assert sorted(t.disk_name for t in tensors) == sorted(lazy_model.weights.names)
    assert all(lazy_model.disk_names[t.name] == t.disk_name for t in tensors)
    names = {tensor.name for tensor in tensors} | set(lazy_model.names.tied)
    assert names == set(model.state_dict())
    order = [(["front", "block", "tail"].index(t.place), t.block or 0) for t in tensors]
    assert order == sorted(order)
    for tensor in tensors:
        assert torch.equal(
            lazy_model.weights.read(tensor.disk_name), model.state_dict()[tensor.name]
        )
    named_by_block = [name for block in range(BLOCKS) for name in lazy_model.block_names(block)]
    assert named_by_block == [tensor.name for tensor in tensors if tensor.place == "block"]
    assert set(lazy_model.front_names) == {t.name for t in tensors if t.place == "front"}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_backward_through_two_shards_gives_the_gradients_of_the_whole_model(checkpoint, family):
    """Parameter gradients are bit for bit the whole model's; that of a tied one is in two parts."""
    chunk = padded_chunk("right")
    model = whole_model(checkpoint(family), torch.float32)
    logits_BTV = model(input_ids=chunk.tokens, attention_mask=chunk.mask.long()).logits
    grad_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(2))
    logits_BTV.backward(grad_BTV)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    lazy_model = LazyModel.open(checkpoint(family))
    with lazy_model.shard(HALVES[0]) as first:
        middle = first.forward(chunk)
    with lazy_model.shard(HALVES[1]) as last:
        grads = last.backward(middle, [grad_BTV])
        found = {name: p.grad for name, p in last.parameters().items()}
    with lazy_model.shard(HALVES[0]) as first:
        assert first.backward(chunk, grads) == []
        found |= {name: p.grad for name, p in first.parameters().items()}
    for target, source in lazy_model.names.tied.items():
        torch.testing.assert_close(found.pop(target) + found.pop(source), expected.pop(source))
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
