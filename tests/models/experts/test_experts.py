"""Experts as ordinary linears compute what the fused module of transformers computes."""

import copy
import inspect

import pytest
import torch
from moe.families import EXPERTS, MOE_FAMILIES, make_moe
from sharded import padded_chunk
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from orchestrator.errors import InputError
from orchestrator.models.experts import replace
from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.replace import replace_experts

LLAMA4_DIFFERENCE = 5e-7
"""Largest difference of float32 logits, relative to the largest one: the fused module of Llama 4
multiplies all tokens by every expert, ours the routed ones alone."""
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_logits_are_those_of_the_fused_module(family, dtype):
    """Bit for bit those of `grouped_mm`, with and without padding; Llama 4 up to 5e-7."""
    model = make_moe(family, dtype)
    arguments = []
    for padding in ("none", "left"):
        chunk = padded_chunk(padding)
        arguments.append({"input_ids": chunk.tokens, "attention_mask": chunk.mask.long()})
    with torch.no_grad():
        expected = [model(**each).logits for each in arguments]
        assert replace_experts(model)
        found = [model(**each).logits for each in arguments]
    for one, other in zip(expected, found, strict=True):
        if family == "llama4":
            assert (one - other).abs().max() <= LLAMA4_DIFFERENCE * one.abs().max()
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_gradients_are_those_of_the_fused_module(family):
    """The gradient of every matrix and bias of an expert is its part of the fused tensor's."""
    native, model = make_moe(family), make_moe(family)
    layouts = replace_experts(model)
    chunk = padded_chunk("right")
    for each in (native, model):
        logits = each(input_ids=chunk.tokens, attention_mask=chunk.mask.long()).logits
        logits[chunk.mask].square().mean().backward()
    compared = 0
    for name, layout in layouts.items():
        fused, experts = native.get_submodule(name), model.get_submodule(name)
        for parameter, own in experts.named_parameters():
            expert, part, kind = parameter.split(".")
            whole = fused.get_parameter(layout.fused_name(part, kind)).grad
            expected = layout.take(part, kind, whole[int(expert)])
            found = torch.zeros_like(expected) if own.grad is None else own.grad
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(whole.max()))
            compared += own.grad is not None
    # of Llama 4, which chooses one expert for a token, some experts get none
    assert compared >= len(layouts) * EXPERTS * 3 // 2


@pytest.fixture
def fused():
    return make_moe("qwen3_moe").model.layers[0].mlp


def test_names_are_those_of_linears(fused):
    """The tensors of the module are the weights of its linears, and no others."""
    replace_experts(fused)
    names = {f"experts.{e}.{part}.weight" for e in range(4) for part in ("gate", "up", "down")}
    assert {name for name in fused.state_dict() if name.startswith("experts.")} == names
    assert all(isinstance(fused.get_submodule(n.removesuffix(".weight")), nn.Linear) for n in names)


def test_hooks_learn_the_tokens_of_the_rows(fused):
    """During a call `routed` has the tokens that the rows come from, and the router's weights."""
    replace_experts(fused)
    states_TH = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    index_TK = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [1, 2], [1, 0], [2, 0]])
    weights_TK = torch.rand(7, 2, generator=torch.Generator().manual_seed(1))
    seen = {}

    def record(module, inputs, name):
        seen[name] = inputs[0], fused.experts.routed

    for name in ("0.gate", "1.up", "2.down", "3.up"):
        module = fused.experts.get_submodule(name)
        module.register_forward_pre_hook(lambda m, inputs, name=name: record(m, inputs, name))
    fused.experts(states_TH, index_TK, weights_TK)
    assert seen.keys() == {"0.gate", "1.up", "2.down"}, "no token goes to the fourth expert"
    for name, (rows_NI, routed) in seen.items():
        chosen_TK = index_TK == int(name[0])
        assert routed.tokens_N.tolist() == chosen_TK.any(dim=1).nonzero()[:, 0].tolist()
        assert torch.equal(routed.weights_N, weights_TK[chosen_TK])
        if "down" not in name:
            assert torch.equal(rows_NI, states_TH[routed.tokens_N])
    assert fused.experts.routed is None


def test_every_expert_is_called_once_on_the_meta_device():
    """Routing has no values there, so that a trace sees every linear, each expert's own input."""
    model = make_moe("gpt_oss").to("meta")
    replace_experts(model)
    mlp = model.model.layers[0].mlp
    calls = []
    for name, module in mlp.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: calls.append((name, id(inputs[0]), inputs[0]))
            )
    mlp(torch.empty(2, 3, 32, device="meta"))
    names = [f"experts.{e}.{part}" for e in range(4) for part in ("gate", "up", "down")]
    assert [name for name, *_ in calls] == names
    inputs = {name: identity for name, identity, _ in calls}
    assert inputs["experts.0.gate"] == inputs["experts.0.up"] != inputs["experts.1.gate"]


def test_a_model_without_experts_is_unchanged():
    """No module of another kind is replaced."""
    model = nn.ModuleDict({"down_proj": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    before = dict(model.named_modules())
    assert replace_experts(model) == {}
    assert dict(model.named_modules()) == before


class ScaledExperts(MixtralExperts):
    """Experts of another formula in a known layout."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        eager = inspect.unwrap(MixtralExperts.forward)
        return 1.001 * eager(self, hidden_states, top_k_index, top_k_weights)


class UnusualExperts(MixtralExperts):
    """Experts with one argument more."""

    def forward(self, hidden_states, top_k_index, top_k_weights, scale):
        return super().forward(hidden_states, top_k_index, top_k_weights) * scale


def with_class(fused, experts_class):
    experts = copy.copy(fused.experts)
    experts.__class__ = experts_class
    fused.experts = experts
    return fused


def test_experts_of_another_formula_are_refused(fused):
    """The probe finds a difference of a thousandth, and the message states it."""
    with pytest.raises(
        InputError, match=r"^experts: .*ScaledExperts .* differ by 1.0e-03, at most"
    ):
        replace_experts(with_class(fused, ScaledExperts))


def test_experts_with_other_arguments_are_refused(fused):
    """The message names the arguments."""
    with pytest.raises(InputError, match="top_k_weights, scale; supported are hidden"):
        replace_experts(with_class(fused, UnusualExperts))


@pytest.mark.parametrize("holder", ["experts", "experts.act_fn"])
def test_experts_with_other_tensors_are_refused(fused, holder):
    """A tensor that no linear of an expert has, as of a norm, is named; the model is unchanged."""
    fused.get_submodule(holder).scale = nn.Parameter(torch.ones(4))
    with pytest.raises(InputError, match=r"scale \[4\]\); such experts are not supported"):
        replace_experts(fused)
    assert not isinstance(fused.experts, Experts)


def test_the_number_of_linears_is_limited(fused, monkeypatch):
    """A config with millions of experts is refused before any linear is made."""
    monkeypatch.setattr(replace, "MOST_EXPERT_LINEARS", 11)
    with pytest.raises(InputError, match="12 linears of experts; at most 11 are supported"):
        replace_experts(fused)
