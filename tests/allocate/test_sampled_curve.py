"""Sampled curves: the error bound, and the plans that they give."""

import numpy as np
import pytest
from allocation import assert_invariants, lost, make_curves, make_linears

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.sampled_curve import sample_curve
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import UsageError
from orchestrator.plan.forms import LOW_RANK

SHAPES = [(400, 300), (300, 500), (700, 200), (256, 256)] * 3
KEEP = (0.2, 0.5, 0.8, 0.95, 1.0)


@pytest.fixture
def problem():
    linears = make_linears(SHAPES)
    return linears, make_curves(linears, seed=3)


def sampled(linears, curves, most):
    return {
        each.name: sample_curve(curves[each.name], LOW_RANK.break_even(each) - 1, most=most)
        for each in linears
    }


@pytest.mark.parametrize("most", [2, 3, 8, 32, 128])
def test_the_stated_error_holds_at_every_rank(problem, most):
    """Sampled losses are within `error` above the curve, and equal to it at samples in float32."""
    linears, curves = problem
    for linear in linears:
        curve = curves[linear.name]
        found = sample_curve(curve, LOW_RANK.break_even(linear) - 1, most=most)
        assert len(found.ranks) <= most
        assert (found.ranks[0], found.ranks[-1]) == (1, LOW_RANK.break_even(linear) - 1)
        gaps = np.array([found.loss(r) - curve.loss(r) for r in range(LOW_RANK.break_even(linear))])
        assert -1e-6 * curve.total < gaps.min()
        assert gaps.max() <= (found.error + 1e-6) * curve.total
        assert np.abs(gaps[found.ranks]).max() <= 1e-6 * curve.total


def test_more_samples_have_a_smaller_error(problem):
    linears, curves = problem
    errors = [
        max(each.error for each in sampled(linears, curves, most).values())
        for most in (4, 16, 64, 1000)
    ]
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] == 0


@pytest.mark.parametrize("keep", KEEP)
def test_a_sample_at_every_rank_gives_the_same_plan(problem, keep):
    linears, curves = problem
    # in float32 like samples, so that ties are broken alike
    for curve in curves.values():
        curve.energies[:] = curve.energies.astype(np.float32)
    every = sampled(linears, curves, 10_000)
    assert Threshold()(linears, every, Budget(keep), {}) == Threshold()(
        linears, curves, Budget(keep), {}
    )


@pytest.mark.parametrize("most", [4, 16, 128])
@pytest.mark.parametrize("keep", KEEP)
def test_the_loss_of_sampling_is_within_the_error_bounds(problem, keep, most):
    """The excess over the best plan of equal size is at most the sum of the stated errors."""
    linears, curves = problem
    samples = sampled(linears, curves, most)
    plan = Threshold()(linears, samples, Budget(keep), {})
    assert_invariants(plan, linears, keep)
    dense = sum(each.values for each in linears)
    best = Threshold()(linears, curves, Budget(plan.stored_values / dense), {})

    def loss(plan):
        return sum(lost(plan.assignments[name], curve) for name, curve in curves.items())

    errors = sum((each.error + 1e-6) * each.total for each in samples.values())
    assert loss(plan) <= loss(best) + errors


def test_break_even_needs_full_curves(problem):
    linears, curves = problem
    with pytest.raises(UsageError, match="not sampled"):
        Threshold(dense="break_even")(linears, sampled(linears, curves, 8), Budget(0.5), {})


def test_curves_are_sampled_above_the_maximum_of_steps(problem, monkeypatch):
    """`threshold` samples curves by itself if the steps are too many."""
    linears, curves = problem
    monkeypatch.setattr("orchestrator.allocate.threshold.MOST_STEPS", 10)
    found = Threshold()(linears, curves, Budget(0.5), {})
    assert found == Threshold()(linears, sampled(linears, curves, 128), Budget(0.5), {})
