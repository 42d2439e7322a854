"""MGAA (reconstruction): fractions between sublayers, one energy level within each."""

import math

import numpy as np
import pytest
from allocation import every_plan, make_cosines, make_curve, make_curves, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.mgaa import RULES, MgaaAllocator
from orchestrator.errors import InfeasibleError, InputError, UsageError

BLOCK = {"mlp.up_proj": (12, 8), "mlp.gate_proj": (10, 10), "mlp.down_proj": (8, 14)}
COSINES = st.lists(st.floats(-1, 1), min_size=2, max_size=8)

every_rule = pytest.mark.parametrize("rule", RULES)


def sizes_of(cosines, seed=0):
    return np.random.default_rng(seed).integers(100, 10_000, size=len(cosines))


def least_retained(linears, curves, assignments):
    """The smallest fraction of energy that any of these linears retains."""
    return min(
        1.0
        if assignments[each.name].form == "dense"
        else curves[each.name].energies[: assignments[each.name].rank].sum()
        / curves[each.name].total
        for each in linears
    )


@every_rule
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 0.7, 1.0])
def test_equal_cosines_give_the_kept_fraction_to_all(rule, cosine):
    """Without differences between sublayers the result is uniform, also for zero scores."""
    size_S = np.array([100, 2000, 30])
    kept_S = MgaaAllocator(rule=rule).kept_fractions(np.full(3, cosine), size_S, 0.8 * 2130)
    np.testing.assert_allclose(kept_S, 0.8, rtol=1e-12)


@every_rule
@given(cosines=COSINES, keep=st.floats(0.31, 0.97))
def test_fractions_meet_budget_bounds_and_order(rule, cosines, keep):
    """The weighted sum meets the budget from below, within [low, high]; similar sublayers keep
    less."""
    cosine_S, size_S = np.array(cosines), sizes_of(cosines)
    budget = keep * size_S.sum()
    kept_S = MgaaAllocator(rule=rule).kept_fractions(cosine_S, size_S, budget)
    assert kept_S.min() >= 0.3
    assert kept_S.max() <= 0.98
    assert kept_S @ size_S <= budget * (1 + 1e-12)
    assert kept_S @ size_S == pytest.approx(budget, rel=1e-9)
    assert np.all(np.diff(kept_S[np.argsort(-cosine_S)]) >= -1e-12)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_power_keeps_in_proportion_within_its_bounds(t):
    """Kept over (1 − c)^t is constant within the bounds."""
    cosine_S = np.array([0.5, 0.6, 0.55])
    kept_S = MgaaAllocator(t=t, low=0.0, high=1).kept_fractions(cosine_S, np.ones(3), 1.5)
    np.testing.assert_allclose(np.diff(kept_S / (1 - cosine_S) ** t), 0, atol=1e-12)


def test_what_a_bound_holds_back_goes_to_the_others():
    """With scores 9 : 4 : 1 and two at their bounds, the third gets the remainder."""
    kept_S = MgaaAllocator(t=1, low=0.3, high=0.9).kept_fractions(
        1 - np.array([0.9, 0.4, 0.1]), np.ones(3), 1.8
    )
    np.testing.assert_allclose(kept_S, [0.9, 0.6, 0.3], rtol=1e-12)


def test_softmax_removes_in_proportion_to_an_exponential():
    """Removed over exp(c / temperature) is constant within the bounds."""
    cosine_S = np.array([0.5, 0.6, 0.55])
    rule = MgaaAllocator(rule="softmax", temperature=0.2, low=0, high=1)
    removed_S = 1 - rule.kept_fractions(cosine_S, np.ones(3), 2.4)
    np.testing.assert_allclose(np.diff(np.log(removed_S)), np.diff(cosine_S) / 0.2, rtol=1e-9)


def test_linear_removes_in_proportion_to_the_cosine():
    """Removed over c is constant, and 0 for c = 0."""
    cosine_S = np.array([0.0, 0.6, 0.3])
    removed_S = 1 - MgaaAllocator(rule="linear", high=1).kept_fractions(cosine_S, np.ones(3), 2.4)
    np.testing.assert_allclose(removed_S, [0, 0.4, 0.2], atol=1e-9)


def test_retain_keeps_in_proportion_to_the_angle():
    """Angles of 90, 60 and 30 degrees: a sublayer that would exceed 1 keeps everything."""
    cosine_S = np.cos(np.pi / np.array([2, 3, 6]))
    kept_S = MgaaAllocator(rule="retain", low=0, high=1).kept_fractions(cosine_S, np.ones(3), 2.2)
    np.testing.assert_allclose(kept_S, [1, 0.8, 0.4], rtol=1e-12)


@given(seed=st.integers(0, 50), keep=st.floats(0.3, 0.98))
@settings(deadline=None, max_examples=40)
def test_the_energy_level_within_a_sublayer_is_the_highest_there_is(seed, keep):
    """No integer ranks within the sublayer's share have a larger minimum of retained energy."""
    linears = make_model(BLOCK, blocks=1)
    curves = make_curves(linears, seed)
    try:
        plan = MgaaAllocator()(linears, curves, Budget(keep), cosines={"0.mlp": 0.5})
    except InfeasibleError:
        return
    best = max(
        least_retained(linears, curves, each) for each in every_plan(linears, plan.budget_values)
    )
    assert least_retained(linears, curves, plan.assignments) == best


@pytest.mark.parametrize("leftover", ["slack", "largest"])
def test_a_sublayer_stores_its_fraction_but_for_one_rank(leftover):
    """The remainder of a share is below the largest step; if passed on, the excess is too."""
    linears = make_model(BLOCK, blocks=3)
    cosines = {"0.mlp": 0.9, "1.mlp": 0.8, "2.mlp": 0.5}
    plan = MgaaAllocator(leftover=leftover)(
        linears, make_curves(linears), Budget(0.7), cosines=cosines
    )
    size = sum(each.values for each in linears) / 3
    kept = MgaaAllocator().kept_fractions(
        np.array([*cosines.values()]), np.full(3, size), 0.7 * 3 * size
    )
    for block in range(3):
        part = [each for each in linears if each.block == block]
        stored = sum(plan.assignments[each.name].stored_values(each) for each in part)
        left, dearest = kept[block] * size - stored, 2 * max(each.rank_cost for each in part)
        assert (0 if leftover == "slack" else -dearest) <= left <= dearest
    if leftover == "largest":
        assert plan.slack_values < dearest


def test_a_linear_without_energy_gets_rank_one():
    """Without energy to capture, ranks go to the other linears until they have captured all."""
    linears = make_model(BLOCK, blocks=1)
    silent = linears[0].name
    curves = make_curves(linears) | {silent: make_curve(silent, np.zeros(8))}
    assert (
        MgaaAllocator()(linears, curves, Budget(0.6), cosines={"0.mlp": 0.5})
        .assignments[silent]
        .rank
        == 1
    )


@pytest.mark.parametrize(("keep", "word"), [(0.25, "lower its low"), (0.99, "raise its high")])
def test_a_budget_outside_the_bounds_is_infeasible(keep, word):
    """The budget is not clipped to the bounds."""
    linears = make_model(BLOCK, blocks=2)
    with pytest.raises(InfeasibleError, match=rf"{keep}.*0\.3, 0\.98.*{word}"):
        MgaaAllocator()(linears, make_curves(linears), Budget(keep), cosines=make_cosines(linears))


def test_a_share_below_rank_one_is_infeasible():
    """The message names the sublayer whose share is too small."""
    linears = make_model(BLOCK, blocks=2)
    with pytest.raises(InfeasibleError, match=r"sublayer 1\.mlp"):
        MgaaAllocator(t=2, low=0.0)(
            linears, make_curves(linears), Budget(0.4), cosines={"0.mlp": 0, "1.mlp": 0.9}
        )


@pytest.mark.parametrize("cosines", [{}, {"0.mlp": math.nan}, {"0.attn": 0.5}])
def test_a_cosine_that_is_missing_or_not_finite_is_refused(cosines):
    """A sublayer without a cosine is not treated as neutral."""
    linears = make_model(BLOCK, blocks=1)
    with pytest.raises(InputError, match=r"sublayer 0\.mlp"):
        MgaaAllocator()(linears, make_curves(linears), Budget(0.7), cosines=cosines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "cosine"}, "rule.*cosine.*linear, power, retain, softmax"),
        ({"t": -1}, "t is -1.*0 to 100"),
        ({"t": "0.5"}, "t is '0.5'.*number"),
        ({"temperature": 0}, "temperature is 0"),
        ({"low": 0.9, "high": 0.8}, r"low is 0\.9.*0 to 0\.8"),
        ({"high": 1.1}, "high is 1.1.*0 to 1"),
        ({"high": math.nan}, "high is nan"),
    ],
)
def test_an_option_outside_its_range_is_refused(options, message):
    """The message has the option, its value and the allowed values."""
    with pytest.raises(UsageError, match=f"mgaa: {message}"):
        MgaaAllocator(**options)
