"""Gates under a size, a polarisation and the loss of the model: where each term alone leads."""

import pytest
import torch
from compressed import some_chunks

from orchestrator.allocate.gates.soco import polarisation_at, pull_at
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.training.distill import LossWeights, distill
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.models.training.polarised import (
    PolarisedGates,
    final_gates,
    gate_fractions,
    scores_and_gains,
)
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.linear import Linear

SIZES = ((12, 8, 4), (30, 20, 11), (16, 16, 7))
"""Outputs, inputs and directions of three linears."""
TOTAL = sum(outputs * inputs for outputs, inputs, _ in SIZES)


def linear_of(outputs, inputs):
    sizes = {"out_features": outputs, "in_features": inputs}
    return Linear(name="a", block=0, role="a", site="a", has_bias=False, **sizes)


def some_gates(seed=0):
    """Polarised gates of random linears; no pass is made, so the model's loss is constant."""
    generator, made = torch.Generator().manual_seed(seed), []
    for outputs, inputs, directions in SIZES:
        weight_OI = torch.randn(outputs, inputs, generator=generator)
        left_OR = torch.linalg.svd(weight_OI, full_matrices=False)[0][:, :directions]
        gated = GatedLowRankLinear(left_OR, left_OR.T @ weight_OI, weight_OI)
        fractions_N = gate_fractions(linear_of(outputs, inputs), LOW_RANK, directions, TOTAL)
        made.append(PolarisedGates(gated, fractions_N))
    return made


def driven(gates, steps, *, rate=0.02, target=0.6, size=0.0, last=0.0):
    """Steps of all terms but the model's loss; gives the kept fraction after each."""
    found = []
    for step in range(1, steps + 1):
        kept = sum(float(each.size()) for each in gates)
        terms = {"penalty": pull_at(kept, target, size)}
        terms["polarisation"] = polarisation_at(step, steps, last)
        for each in gates:
            each.update(step, rate, **terms)
        found.append(sum(float(each.size()) for each in gates))
    return found


def test_open_gates_are_the_whole_model():
    """At the start every gate is 1 to the bit, and their fractions are 1 together."""
    gates = some_gates()
    assert all(torch.equal(each.gates_N, torch.ones_like(each.gates_N)) for each in gates)
    assert sum(float(each.size()) for each in gates) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_the_size_alone_drives_the_kept_fraction_to_its_target(target):
    """From 1, where its slope is that from below, to within the length of a step."""
    kept = driven(some_gates(), 400, target=target, size=10.0)
    assert max(abs(each - target) for each in kept[-50:]) < 0.02
    assert kept[0] < 1


def test_polarisation_alone_parts_gates_at_a_half():
    """Gates below end at 0, those above at 1, which Adam's momentum takes them past; none stays in
    between, and amplified ones do not move."""
    (gates,) = some_gates()[:1]
    begun_N = torch.tensor([0.2, 0.45, 0.55, 0.9, 1.5])
    gates.logit_N.copy_(torch.logit(begun_N / 2))
    for step in range(1, 601):
        gates.update(step, 0.02, penalty=0.0, polarisation=1.0)
    found_N = gates.gates_N
    torch.testing.assert_close(found_N[-1], begun_N[-1], rtol=1e-6, atol=0)
    assert float(found_N[:2].max()) < 0.02
    assert 1 <= float(found_N[2:4].min()) <= float(found_N[2:4].max()) < 1.2


def test_steps_are_those_of_torch_adam_on_the_written_loss():
    """The gradient by autograd of λ1 |ρ - target| + λ2 Σ w s̃ (1 - s̃) + <h, s> through the sigmoid,
    away from the kinks, and Adam's step with it."""
    gates = some_gates()
    generator = torch.Generator().manual_seed(3)
    copies = []
    for each in gates:
        each.logit_N.copy_(torch.randn(len(each.logit_N), generator=generator))
        each.apply()
        copies.append(each.logit_N.clone().requires_grad_())
    optimizer = torch.optim.Adam(copies, lr=0.05)
    for step in range(1, 4):
        slopes = [torch.randn(len(each), generator=generator) * 1e-3 for each in copies]
        optimizer.zero_grad()
        loss, kept = 0.0, 0.0
        for copy, each, slope_N in zip(copies, gates, slopes, strict=True):
            s_N = 2 * copy.sigmoid()
            bounded_N = s_N.clamp(max=1)
            kept = kept + (each._fractions_N * bounded_N.maximum(bounded_N[-1])).sum()
            mixed = (each._fractions_N * bounded_N * (1 - bounded_N)).sum()
            loss = loss + 0.7 * mixed + (slope_N * s_N).sum()
        (loss + 3.0 * (kept - 0.5).abs()).backward()
        optimizer.step()
        pull = pull_at(sum(float(each.size()) for each in gates), 0.5, 3.0)
        for copy, each, slope_N in zip(copies, gates, slopes, strict=True):
            each._gates.grad, each._tail.grad = slope_N[:-1].clone(), slope_N[-1:].clone()
            each.update(step, 0.05, penalty=pull, polarisation=0.7)
            torch.testing.assert_close(each.logit_N, copy.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [LOW_RANK, PIVOTED])
def test_the_size_of_closed_and_open_gates_is_that_of_the_plan(form):
    """The stored values of each rank over the dense ones; all of them while the tail is open."""
    linear, count = linear_of(16, 24), 6
    weight_OI = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    gated = GatedLowRankLinear(weight_OI[:, :count], weight_OI[:count], weight_OI)
    gates = PolarisedGates(gated, gate_fractions(linear, form, count, linear.values))
    for rank in range(1, count + 1):
        for tail in (False, True):
            gates.logit_N.fill_(-torch.inf)
            gates.logit_N[:rank] = 1.0
            gates.logit_N[-1] = 0.5 if tail else -torch.inf
            stored = linear.values if tail else form.factor_values(linear, rank)
            assert float(gates.size()) == pytest.approx(stored / linear.values, rel=1e-6)
            assert gates.open_gates().tolist() == [True] * rank + [False] * (count - rank) + [tail]
    scores, gains = scores_and_gains(final_gates({"logit.a": gates.logit_N})["a"])
    assert (scores > 0).tolist() == gates.open_gates().tolist()
    assert gains.tolist() == gates.gates_N[:-1].tolist()


def test_a_state_continues_to_the_same_bits():
    """Ten steps, and ten from their state in new gates, equal twenty."""
    whole, parts, later = some_gates(), some_gates(), some_gates()
    terms = {"penalty": 10.0, "polarisation": 0.1}
    for step in range(1, 21):
        if step == 11:
            for one, other in zip(parts, later, strict=True):
                for name, tensor in other.state().items():
                    tensor.copy_(one.state()[name])
                other.apply()
        for each in (*whole, *(parts if step < 11 else later)):
            each.update(step, 0.02, **terms)
    for one, other in zip(whole, later, strict=True):
        assert torch.equal(one.gates_N, other.gates_N)
        assert torch.equal(one._gates, other._gates)


def gated_shard(directory, directions=5):
    """A shard of the whole model with gates on every linear, and its gates."""
    shard = LazyModel.open(directory, dtype=torch.float32).shard(range(4))
    shard.freeze()
    found = {}
    for linear in shard.linears:
        module = shard.module(linear.name)
        weight_OI = dense_weight(module)
        left_OR = torch.linalg.svd(weight_OI, full_matrices=False)[0][:, :directions]
        gated = GatedLowRankLinear(left_OR, left_OR.T @ weight_OI, weight_OI, module.bias)
        shard.run_as(module, gated.__call__)
        fractions_N = gate_fractions(linear, LOW_RANK, directions, 10**5)
        found[linear.name] = gated, PolarisedGates(gated, fractions_N)
    return shard, found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_divergence_alone_leaves_all_gates_at_1(family, checkpoint):
    """The gated model with open gates is the dense one to the bit, where the KL's gradient is 0."""
    (chunk,), weights = some_chunks(1), LossWeights(divergence=1.0, cross_entropy=0.0)
    with LazyModel.open(checkpoint(family), dtype=torch.float32).shard(range(4)) as dense:
        targets = dense.logits(chunk)
    shard, found = gated_shard(checkpoint(family))

    def grads(logits_BTV):
        given = logits_BTV, chunk.tokens, chunk.mask, targets
        return distill(*given, temperature=1.0, weights=weights)[1]

    for step in (1, 2):
        shard.backward(chunk, grads)
        for _, gates in found.values():
            gates.update(step, 0.02, penalty=0.0, polarisation=0.0)
            assert torch.equal(gates.gates_N, torch.ones_like(gates.gates_N))
    assert torch.equal(shard.logits(chunk), targets)


def test_gates_folded_into_the_left_factor_leave_the_logits(checkpoint):
    """Directions that stay, with gates above 1 and below, are U diag(s) D in the low-rank form."""
    (chunk,), generator = some_chunks(1), torch.Generator().manual_seed(0)
    shard, found = gated_shard(checkpoint("llama"))
    for gated, gates in found.values():
        gates.logit_N.copy_(torch.randn(len(gates.logit_N), generator=generator))
        gates.logit_N[-1] = -torch.inf
        gates.logit_N[gates.gates_N < 0.7] = -torch.inf
        gates.apply()
        assert float(gated.tail.detach()) == 0
    assert any(0 < float((gated.gates_R == 0).float().mean()) < 1 for gated, _ in found.values())
    gated_BTV = shard.logits(chunk)
    for name, (gated, _) in found.items():
        module, kept = shard.module(name), gated.gates_R.nonzero().squeeze(1)
        folded = LowRankLinear(module.in_features, module.out_features, len(kept), bias=False)
        folded.weight.data.copy_((gated.left_OR * gated.gates_R.detach())[:, kept])
        folded.down.weight.data.copy_(gated.right_RI[kept])
        shard.run_as(module, folded.__call__)
    torch.testing.assert_close(shard.logits(chunk), gated_BTV, rtol=1e-5, atol=1e-5)
