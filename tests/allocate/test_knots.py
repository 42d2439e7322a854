"""Curves at some of their ranks: the bound that they state, and the plans that they give."""

import numpy as np
import pytest
from allocation import assert_invariants, lost, make_curves, make_linears

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


def in_knots(linears, curves, most):
    return {
        each.name: sample_curve(curves[each.name], LOW_RANK.break_even(each) - 1, most=most)
        for each in linears
    }


@pytest.mark.parametrize("most", [2, 3, 8, 32, 128])
def test_the_stated_error_holds_at_every_rank(problem, most):
    """Above the curve and no further than said; at a knot on it, as float32 has it."""
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


def test_more_knots_err_less(problem):
    linears, curves = problem
    errors = [
        max(each.error for each in in_knots(linears, curves, most).values())
        for most in (4, 16, 64, 1000)
    ]
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] == 0


@pytest.mark.parametrize("keep", KEEP)
def test_a_knot_at_every_rank_changes_no_plan(problem, keep):
    linears, curves = problem
    # in float32 as knots are, so that no tie is broken otherwise
    for curve in curves.values():
        curve.energies[:] = curve.energies.astype(np.float32)
    every = in_knots(linears, curves, 10_000)
    assert Threshold()(linears, every, keep, {}) == Threshold()(linears, curves, keep, {})


@pytest.mark.parametrize("most", [4, 16, 128])
@pytest.mark.parametrize("keep", KEEP)
def test_a_plan_of_knots_loses_no_more_than_they_err(problem, keep, most):
    """Above the best plan that stores no more: what all knots state together."""
    linears, curves = problem
    knots = in_knots(linears, curves, most)
    plan = Threshold()(linears, knots, keep, {})
    assert_invariants(plan, linears, keep)
    dense = sum(each.values for each in linears)
    best = Threshold()(linears, curves, plan.stored_values / dense, {})

    def loss(plan):
        return sum(lost(plan.assignments[name], curve) for name, curve in curves.items())

    errors = sum((each.error + 1e-6) * each.total for each in knots.values())
    assert loss(plan) <= loss(best) + errors


def test_break_even_wants_whole_curves(problem):
    linears, curves = problem
    with pytest.raises(UsageError, match="not knots"):
        Threshold(dense="break_even")(linears, in_knots(linears, curves, 8), 0.5, {})


def test_very_many_steps_are_taken_by_knots(problem, monkeypatch):
    """A threshold over more than it can hold does so by itself."""
    linears, curves = problem
    monkeypatch.setattr("orchestrator.allocate.threshold.MOST_STEPS", 10)
    found = Threshold()(linears, curves, 0.5, {})
    assert found == Threshold()(linears, in_knots(linears, curves, 128), 0.5, {})
