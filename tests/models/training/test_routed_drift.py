"""Inputs of experts in two models, paired by the tokens that both route to an expert."""

import pytest
import torch
from moe.families import VOCABULARY, make_moe
from torch.nn.functional import silu

from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.routed_drift import SITE_BYTES, gather_routed, split_sites

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The dense model, and another one with noise in the weights of its first block."""
    made = {"dense": make_moe(FAMILY), "other": make_moe(FAMILY)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made["other"].model.layers[0].self_attn.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
    paths = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(paths[name])
        replace_experts(model)
    return made, paths


def chunks():
    generator = torch.Generator().manual_seed(1)
    for index in range(2):
        tokens_BT = torch.randint(3, VOCABULARY, (3, 20), generator=generator)
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        mask_BT[0, :7] = False
        yield Chunk(index, tokens_BT * mask_BT, mask_BT)


def routed_inputs(model, chunk):
    """States at the experts of the first block, and the chosen experts of every token."""
    seen = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    with torch.no_grad():
        model(input_ids=chunk.tokens, attention_mask=chunk.mask.long())
    hook.remove()
    states_TH, index_TK, _ = seen[0]
    return states_TH.detach(), index_TK


def inner(model, expert, rows_NH):
    linears = model.model.layers[0].mlp.experts.get_submodule(str(expert))
    with torch.no_grad():
        return silu(linears.gate(rows_NH)) * linears.up(rows_NH)


@pytest.mark.parametrize("is_paired", [True, False])
def test_moments_are_of_the_tokens_that_both_route_to_an_expert(models, is_paired):
    """H, E and D equal plain sums over those tokens, or H alone over all of the compressed one."""
    made, paths = models
    lazy = {name: LazyModel.open(path) for name, path in paths.items()}
    inputs = [*chunks()]
    with lazy["dense"].shard(range(1)) as dense, lazy["other"].shard(range(1)) as other:
        linears = [x for x in other.linears if x.name.endswith((".gate", ".down"))]
        first = dense if is_paired else None
        grams = gather_routed(first, other, linears, dense_inputs=inputs, inputs=inputs)
        for linear in linears:
            module = other.module(linear.name)
            assert not module._forward_pre_hooks
    rows = {linear.site: ([], []) for linear in linears}
    unpaired = 0
    for chunk in inputs:
        (x_TH, dense_TK), (z_TH, other_TK) = (
            routed_inputs(made[name], chunk) for name in ("dense", "other")
        )
        for linear in linears:
            expert = int(linear.name.split(".")[-2])
            here = (other_TK == expert).any(dim=1) & chunk.mask.flatten()
            both = here & (dense_TK == expert).any(dim=1)
            unpaired += int(here.sum() - both.sum())
            at = both if is_paired else here
            x, z = x_TH[at], z_TH[at]
            if linear.name.endswith("down"):
                x, z = inner(made["dense"], expert, x), inner(made["other"], expert, z)
            rows[linear.site][0].append(x.double())
            rows[linear.site][1].append(z.double())
    assert unpaired, "some tokens change their experts"
    for site, (xs, zs) in rows.items():
        x, z = torch.cat(xs), torch.cat(zs)
        gap = x - z if is_paired else torch.zeros_like(z)
        drift = grams[site].drift()
        assert drift.tokens == grams[site].tokens == len(z)
        for found, expected in (
            (drift.moment_II, z.T @ z),
            (drift.cross_II, gap.T @ z),
            (drift.spread_II, gap.T @ gap),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sites_of_experts_are_gathered_together(models, monkeypatch):
    """First linears of all experts, then all `down`; in parts if the moments take much memory."""
    _, paths = models
    with LazyModel.open(paths["dense"]).shard(range(1)) as shard:
        names = [linear.name.removeprefix("model.layers.0.") for linear in shard.linears]
        assert names[4:6] == ["mlp.experts.0.gate", "mlp.experts.0.up"]

        def groups():
            found = split_sites(shard, shard.linears)
            return [[site.removeprefix("model.layers.0.") for site in group] for group in found]

        gates = [f"mlp.experts.{expert}.gate" for expert in range(4)]
        downs = [f"mlp.experts.{expert}.down" for expert in range(4)]
        assert groups() == [["self_attn.q_proj"], ["self_attn.o_proj"], gates, downs]
        limit = "orchestrator.models.training.routed_drift.TOGETHER_BYTES"
        monkeypatch.setattr(limit, 3 * SITE_BYTES * 32**2)
        assert groups()[2:4] == [gates[:3], gates[3:]]
        monkeypatch.setattr(limit, 1)
        assert groups()[2:6] == [[gate] for gate in gates]
