"""Adapters beside gates: nothing at the start, Adam's steps, and a state that continues."""

import torch
from torch.nn.functional import linear

from orchestrator.models.training.adapted import (
    SCALE,
    UNIT,
    AdaptedScores,
    Adapter,
    adapter_rows,
)
from orchestrator.models.training.gate_scores import GatePull, GateTraining
from orchestrator.models.training.gated import GatedLowRankLinear

RATE = 0.05


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make():
    """A weight [6, 8] as 6 directions, of which 2 may be stored, with an adapter of rank 2."""
    left_OK, values_K, right_KI = torch.linalg.svd(normal(6, 8), full_matrices=False)
    adapter = Adapter((6, 8, 2), torch.Generator().manual_seed(1), torch.device("cpu"))
    gated = GatedLowRankLinear(left_OK, values_K[:, None] * right_KI, adapter=adapter)
    ones = torch.ones(3)
    return gated, adapter, AdaptedScores(gated, GatePull(direction=ones, tail=ones), adapter)


def back(gated, number):
    """Gradient of a loss of this number, which is also given by autograd's own way."""
    input, target = normal(5, 8, seed=number), normal(5, 6, seed=-number)
    (gated(input) - target).square().mean().backward()
    return input, target


def test_steps_are_those_of_adam():
    """The adapter is nothing at the start, and then that of torch's AdamW on the same losses, with
    the gates of each step; the scores are those of gates alone."""
    gated, adapter, scores = make()
    assert torch.equal(gated(normal(5, 8)), make()[0](normal(5, 8)))
    with torch.no_grad():
        assert not adapter(normal(5, 8)).any()
    own = [each.detach().clone().requires_grad_() for each in adapter.parameters()]
    adam = torch.optim.AdamW(own, lr=RATE * UNIT, weight_decay=0.0)
    for number in range(1, 31):
        gates_K = gated.gates_R.detach().clone()
        input, target = back(gated, number)
        cut_OI = gated.left_OR @ torch.diag(gates_K) @ gated.right_RI
        found = linear(input, cut_OI + SCALE * own[0] @ own[1])
        adam.zero_grad()
        (found - target).square().mean().backward()
        adam.step()
        scores.update(number, RATE, penalty=0.01 * 1.2**number)
    assert scores.closed.any()
    for found, expected in zip(adapter.parameters(), own, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
        assert float(found.detach().abs().max()) > 1e-3


def test_a_state_continues_to_the_bit():
    """Values and moments after a state are those without it; the rows of a unit are the product."""
    (one, first, ahead), (two, second, later) = make(), make()
    training = [GateTraining({3: {"a": each}}) for each in (ahead, later)]
    for number in range(1, 8):
        back(one, number)
        training[0].update(number, RATE, 0.0, 0.0)
    training[1].load(3, {name: each.clone() for name, each in training[0].state(3).items()})
    for number in range(8, 12):
        for gated, each in zip((one, two), training, strict=True):
            back(gated, number)
            each.update(number, RATE, 0.0, 0.0)
    assert torch.equal(first.left_OA, second.left_OA)
    assert torch.equal(first.right_AI, second.right_AI)
    assert training[0].num_parameters == {3: 6 + 2 * (6 + 8)}
    rows = adapter_rows(training[0].state(3))
    input = normal(4, 8)
    product = linear(input, rows["a.weight"].T @ rows["a.down"])
    torch.testing.assert_close(product, first(input))
