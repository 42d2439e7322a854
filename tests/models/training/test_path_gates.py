"""Gates of a path: evidence about curves, gains, thresholds, order and state."""

import numpy as np
import pytest
import torch

from orchestrator.models.training.gated import GatedLowRankLinear
from orchestrator.models.training.path_gates import (
    EVIDENCE,
    PathGates,
    PathSettings,
    path_gains,
    path_scores,
)
from orchestrator.plan.curve import PathCurve

OUT, IN, RANK, TOKENS = 6, 8, 3, 4000
SETTINGS = PathSettings(gains=True, prior=0.1, memory=0.5, tokens=TOKENS, step_tokens=TOKENS)
ENERGY_K = np.array([4e-3, 2e-3, 1e-3])
TAIL = 5e-4
WORTH_S = np.array([np.inf, 3e-4, 2e-4, 1e-4])
LOSS_S = np.append(TAIL + ENERGY_K.sum() - np.append(0, np.cumsum(ENERGY_K))[:-1], TAIL)


def make_gates(settings=SETTINGS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((OUT, RANK), (RANK, IN), (OUT, IN))
    gated = GatedLowRankLinear(*(torch.randn(shape, generator=draw) for shape in shapes))
    return PathGates(gated, PathCurve(WORTH_S, ENERGY_K, LOSS_S), settings), gated


def by_the_curve(gates, gradient_K=(0.0, 0.0, 0.0)):
    """Gradients that leave κ as it is: closed gates gain what the curve says."""
    count = int(gates.open)
    return [*gradient_K, -2 * LOSS_S[count] if count < 4 else 0.0]


def step(gates, gated, gradient_N, threshold, number=1, rate=0.1):
    gated.gates_R.grad = torch.tensor(gradient_N[:-1], dtype=torch.float32)
    gated.tail.grad = torch.tensor(gradient_N[-1:], dtype=torch.float32)
    gates.update(number, rate, penalty=threshold)


def test_a_threshold_closes_steps_from_the_last_one_on():
    """The tail first, then directions by descending worth, and never the first; what is closed
    stays closed at a lower threshold, and the gates of the passes are those."""
    gates, gated = make_gates()
    for number, (threshold, count) in enumerate(
        [(5e-5, 4), (1.5e-4, 3), (2.5e-4, 2), (1e-4, 2), (1.0, 1)], 1
    ):
        step(gates, gated, by_the_curve(gates), threshold, number)
        assert gates.open_gates().tolist() == [place < count for place in range(4)]
        assert gated.gates_R.tolist() == [float(place < count) for place in range(3)]
        assert gated.tail.tolist() == [float(count == 4)]
        assert gates.counts() == (min(count, 3), count == 4)


def test_the_factor_is_the_gain_of_opening_over_that_of_the_curve():
    """At the optimum of a quadratic loss -Σ h over closed gates is 2 E, so that exact gradients
    leave κ at 1; twice as steep a loss gives 2, but for the prior, and is bounded."""
    for slope, largest in ((1.0, 1.0), (2.0, 2.0), (100.0, 5.0), (-3.0, 0.2)):
        gates, gated = make_gates()
        step(gates, gated, [0.0] * 4, 2.5e-4)  # keeps two directions
        losses = np.append(ENERGY_K, TAIL)
        closed = [0.0, 0.0, *(-2 * slope * losses[2:])]
        expected = 0.0
        for number in range(2, 9):
            step(gates, gated, closed, 2.5e-4, number)
            expected = expected * SETTINGS.memory + 2 * LOSS_S[2] * TOKENS
            wanted = (EVIDENCE + slope * expected) / (EVIDENCE + expected)
            assert float(gates.factor) == pytest.approx(np.clip(wanted, 0.2, 5.0), rel=1e-5)
        assert float(gates.factor) == pytest.approx(largest, rel=0.2)


def test_gains_end_at_the_mode_of_the_posterior():
    """With the gradient of Σ e (s - target)² they end at the mode of N times it and the prior;
    those of closed directions stay 1, and a linear that is whole has none."""
    target_K = np.array([1.05, 0.8, 1.3])
    gates, gated = make_gates()
    for number in range(1, 4):
        step(gates, gated, [0.1] * 4, 1e-6, number)
    assert gates.gain.tolist() == [1.0] * 3
    step(gates, gated, [0.0] * 4, 2.5e-4, 4)
    for number in range(5, 400):
        slope_K = 2 * ENERGY_K * (gates.gain.double().numpy() - target_K)
        step(gates, gated, by_the_curve(gates, [*slope_K[:2], 0.0]), 2.5e-4, number)
    weight_K = 2 * ENERGY_K * TOKENS
    mode_K = (weight_K * target_K + SETTINGS.prior**-2) / (weight_K + SETTINGS.prior**-2)
    np.testing.assert_allclose(gates.gain[:2], mode_K[:2], rtol=1e-4)
    np.testing.assert_allclose(gates.averaged[:2], mode_K[:2], rtol=1e-4)
    assert float(gates.gain[2]) == 1
    assert gated.gates_R.tolist() == [*gates.gain[:2].tolist(), 0.0]


def test_without_gains_open_gates_are_1():
    settings = PathSettings(gains=False, prior=0.1, memory=0.5, tokens=9, step_tokens=9.0)
    gates, gated = make_gates(settings)
    for number in range(1, 9):
        step(gates, gated, by_the_curve(gates, [0.5, 0.5, 0.0]), 2.5e-4, number)
    assert gated.gates_R.tolist() == [1.0, 1.0, 0.0]


def test_scores_are_in_the_order_of_closing():
    """Above 0 for open steps alone; a step that is closed later has a higher score, and of those of
    one threshold that of the larger worth, however κ has changed."""
    gates, gated = make_gates()
    step(gates, gated, [0.0] * 4, 1.5e-4, 1)  # closes the tail
    step(gates, gated, [0.0, 0.0, 0.0, 1.0], 1.6e-4, 2)  # κ falls to its bound: and two more
    assert gates.counts() == (1, False)
    state = {f"{part}.a": each for part, each in gates.state().items()}
    score_N = path_scores(state)["a"]
    assert score_N[0] > 0
    assert (score_N[1:] <= 0).all()
    assert score_N[1] >= score_N[2] > score_N[3]
    assert path_gains(state)["a"].tolist() == gates.averaged.tolist()


def test_the_state_is_all_that_steps_depend_on():
    """Gates that take over a state go on bit by bit."""
    draw = np.random.default_rng(5)
    gradients = draw.normal(0, 1e-3, (12, 4))
    thresholds = np.linspace(5e-5, 3e-4, 12)
    first, gated = make_gates()
    for number in range(6):
        step(first, gated, gradients[number], thresholds[number], number + 1)
    second, other = make_gates()
    for part, tensor in second.state().items():
        tensor.copy_(first.state()[part])
    second.apply()
    for number in range(6, 12):
        step(first, gated, gradients[number], thresholds[number], number + 1)
        step(second, other, gradients[number], thresholds[number], number + 1)
    for part, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[part]), part
