"""Scores of gates: the authors' units, closed gates, order by cost, state."""

import itertools

import numpy as np
import pytest
import torch

from orchestrator.models.training.gate_scores import (
    GatePull,
    GateScores,
    GateTraining,
    final_scores,
    gate_pulls,
    scores_after,
    with_tail,
)
from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.linear import Linear

RATE, MASK = 0.02, 0.02
"""Rate of scores, which is eight times the default's; and the value at which masks begin."""


def make_linear(out_features, in_features):
    sizes = {"out_features": out_features, "in_features": in_features}
    return Linear(name="a", block=0, role="a", site="a", has_bias=False, **sizes)


def make_scores(count, pull=None, seed=0):
    """Scores of a linear with random factors, 3 outputs and 5 inputs."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((3, count), (count, 5), (3, 5))
    gated = GatedLowRankLinear(*(torch.randn(shape, generator=draw) for shape in shapes))
    ones = torch.ones(count + 1)
    return GateScores(gated, pull or GatePull(direction=ones, tail=ones)), gated


def step(scores, gated, gradient_N, number, *, rate=RATE, penalty=0.0):
    gated.gates_R.grad = torch.as_tensor(gradient_N[:-1], dtype=torch.float32).clone()
    gated.tail.grad = torch.as_tensor(gradient_N[-1:], dtype=torch.float32).reshape(
        gated.tail.shape
    )
    scores.update(number, rate, penalty=penalty)


def test_gates_close_in_the_steps_of_the_authors_units():
    """With masks from 0.02, the rate, λ and epsilon of those units, torch's Adam closes every mask
    in the same step, whatever the gradients: random ones, and a pull that grows."""
    count = 30
    draw = torch.Generator().manual_seed(1)
    size_N = torch.logspace(-6, -3, count + 1)
    scores, gated = make_scores(count)
    mask_N = torch.full((count + 1,), MASK, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.AdamW([mask_N], lr=RATE * MASK, betas=(0.9, 0.999), weight_decay=0.0)
    closed_N = torch.zeros(count + 1, dtype=torch.int32)
    for number in range(1, 301):
        gradient_N = size_N * torch.randn(count + 1, generator=draw)
        penalty = 2e-5 * 1.03**number
        step(scores, gated, gradient_N, number, penalty=penalty)
        # L depends on mask / MASK, and the pull of the authors is that of masks
        slope_N = gradient_N.double() / MASK + penalty / MASK
        mask_N.grad = torch.where(mask_N.detach() > 0, slope_N, 0.0)
        adam.step()
        closed_N[(closed_N == 0) & (mask_N.detach() <= 0)] = number
    assert torch.equal(scores.closed, closed_N)
    assert len(set(closed_N.tolist())) > 10


def test_closed_gates_stay_closed():
    """Even if the loss asks for them: their gradient no longer counts, and their score falls on."""
    scores, gated = make_scores(4)
    for number in range(1, 61):
        step(scores, gated, [1, 1, -1, -1, -1], number)
    assert scores.closed.tolist()[2:] == [0, 0, 0]
    assert all(scores.closed[:2] > 0)
    before = scores.score.clone()
    for number in range(61, 161):
        step(scores, gated, [-1e6, -1e6, -1, -1, -1], number)
        assert bool((scores.open == (scores.score > 0)).all())
    assert bool((scores.score[:2] < before[:2]).all())
    assert gated.gates_R.tolist() == [0, 0, 1, 1]
    assert gated.tail.item() == 1


def test_the_last_direction_of_a_linear_to_close_is_kept():
    """All gates closed: the passes still take the one that closed last, as a plan does."""
    scores, gated = make_scores(3)
    for number in range(1, 200):
        step(scores, gated, [3e-4, 1e-4 if number > 40 else -1e-4, 3e-4, 1], number)
    assert not scores.open.any()
    assert gated.gates_R.tolist() == [0, 1, 0]
    assert gated.tail.item() == 0


def test_the_order_is_that_of_the_loss_and_best_of_all_subsets():
    """Two linears, quadratic losses a (1 - s)² of every gate and a slowly growing pull: gates close
    in the order of a, and for every size no other subset loses less."""
    loss_N = np.array([5.0, 0.7, 2.0, 0.1, 1.1, 3.0, 0.3, 8.0])
    (one, first), (two, second) = make_scores(3), make_scores(3, seed=1)
    places = ((one, first, [0, 1, 2, 3]), (two, second, [4, 5, 6, 7]))
    for number in range(1, 901):
        for scores, gated, part in places:
            gradient_N = -2 * loss_N[part] * (1 - scores.score.numpy())
            step(scores, gated, gradient_N, number, rate=0.005, penalty=0.05 * 1.007**number)
    closed_N = torch.cat([one.closed, two.closed]).numpy()
    assert (closed_N > 0).all()
    order = np.argsort(-closed_N)
    assert order.tolist() == np.argsort(-loss_N).tolist()
    for size in range(1, 8):
        lost = {
            kept: loss_N.sum() - loss_N[list(kept)].sum()
            for kept in itertools.combinations(range(8), size)
        }
        assert lost[tuple(sorted(order[:size].tolist()))] == pytest.approx(min(lost.values()))


def test_without_a_tail_a_linear_is_whole_as_long_as_break_even_is_open():
    """Three of 7 directions may be stored: the linear is whole while more than 3 gates are open,
    those behind them too; it is left with the stored ones that are open, or the last of them to
    close; and the tail's score is that of the fourth best."""
    draw = torch.Generator().manual_seed(3)
    gated = GatedLowRankLinear(torch.randn(8, 7, generator=draw), torch.randn(7, 8, generator=draw))
    ones = torch.ones(4)
    scores = GateScores(gated, GatePull(direction=ones, tail=ones))
    closes = torch.tensor([70, 20, 50, 40, 60, 10, 30])
    seen = []
    for number in range(1, 200):
        gated.gates_R.grad = torch.where(number > closes, 1e-3, -1e-3)
        scores.update(number, 0.05, penalty=0.0)
        is_open = scores.open
        count, is_whole = scores.counts()
        assert count == int(is_open[:3].sum())
        assert is_whole == (int(is_open.sum()) > 3)
        seen.append((count, is_whole))
        found = with_tail(scores_after(scores.score, scores.closed, number), 3)
        assert (float(found[-1]) > 0) == is_whole
        assert len(found) == 4
    assert list(dict.fromkeys(seen)) == [(3, True), (2, True), (2, False), (1, False), (0, False)]
    assert gated.gates_R.tolist() == [1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("form", [LOW_RANK, PIVOTED], ids=lambda form: form.name)
def test_pulls_by_cost_are_the_values_that_are_saved(form):
    """Closing the tail and then all directions but one saves all but rank 1; the mean is 1, and a
    direction that closes before the tail leaves its values to it."""
    linear = make_linear(12, 20)
    (pull,) = gate_pulls([linear], form, "cost").values()
    count = len(pull.tail) - 1
    values = form.factor_values(linear, count) / count
    assert pull.direction[1:].mean() == pytest.approx(1)
    for directions in range(1, count + 1):
        left = pull.tail[directions] + pull.direction[2 : directions + 1].sum()
        assert left * values == pytest.approx(linear.values - form.factor_values(linear, 1))
    (equal,) = gate_pulls([linear], form, "count").values()
    assert set(equal.tail.tolist()) == set(equal.direction.tolist()) == {1.0}


def test_a_state_continues_to_the_bit():
    """Scores, moments, steps and gates after a state are those without it."""
    draws = torch.randn(60, 6, generator=torch.Generator().manual_seed(2)) + 1
    (one, first), (two, second) = make_scores(5), make_scores(5)
    for number, draw in enumerate(draws[:45], start=1):
        step(one, first, draw, number, rate=0.03)
    state = GateTraining({3: {"a": one}}).state(3)
    GateTraining({3: {"a": two}}).load(3, state)
    assert torch.equal(first.gates_R, second.gates_R)
    for number, draw in enumerate(draws[45:], start=46):
        for scores, gated in ((one, first), (two, second)):
            step(scores, gated, draw, number, rate=0.03)
    assert torch.equal(one.score, two.score)
    assert torch.equal(one.closed, two.closed)
    assert one.closed.any()
    found = final_scores(GateTraining({3: {"a": one}}).state(3), 60)["a"].numpy()
    closed = one.closed.numpy()
    assert (found[closed > 0] == closed[closed > 0] - 61).all()
    assert (found[closed == 0] > 0).all()
