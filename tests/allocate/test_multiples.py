"""Ranks that are multiples: the automatic number, the laws of all allocators, and the optimum."""

import numpy as np
import pytest
from allocation import (
    RANK_ALLOCATORS,
    assert_invariants,
    every_plan,
    lost,
    make_cosines,
    make_curve,
    make_curves,
    make_linears,
    make_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.sampled_curve import sample_curve
from orchestrator.allocate.steps import step_costs
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import InfeasibleError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.forms import LOW_RANK, PIVOTED

SHAPES = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (24, 48),
    "self_attn.v_proj": (24, 48),
    "mlp.down_proj": (48, 96),
}
MODEL = make_model(SHAPES, blocks=3)
TINY = make_model({"mlp.up_proj": (20, 12), "mlp.down_proj": (12, 18)}, blocks=2)
FORMS = pytest.mark.parametrize("form", [LOW_RANK, PIVOTED], ids=lambda form: form.name)
OPTIONS = {
    "mgaa": {"low": 0.1, "high": 1.0},
    "strs": {"grid": "0.2 0.4 0.6 0.8 0.9"},
    "d-rank": {"beta": 0.2},
}


def summed_loss(plan, curves):
    return sum(lost(plan.assignments[name], curve) for name, curve in curves.items())


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        ((8192, 8192), 64),
        ((2048, 5632), 64),
        ((2047, 5632), 16),
        ((1024, 8192), 16),
        ((576, 1536), 16),
        ((256, 256), 16),
        ((192, 576), 8),
        ((64, 176), 4),
        ((31, 31), 1),
        ((1, 9), 1),
    ],
)
def test_the_automatic_multiple_is_by_the_smaller_width(shape, step):
    """16 below width 2048 and 64 from there, at most a sixteenth of the width, either way round."""
    for size in (shape, shape[::-1]):
        (linear,) = make_linears([size])
        assert AllowedRanks(multiple="auto").step(linear) == step


@given(
    shape=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    multiple=st.sampled_from([1, 2, 7, 16, 64, "auto"]),
    form=st.sampled_from([LOW_RANK, PIVOTED]),
    part=st.floats(0, 1),
)
def test_allowed_ranks_are_all_multiples_below_break_even(shape, multiple, form, part):
    """As many as stated; the largest within a number of values is the best of them; the automatic
    number leaves some wherever any rank saves values."""
    (linear,) = make_linears([shape])
    allowed = AllowedRanks(form, multiple)
    step, ranks = allowed.step(linear), allowed.of(linear)
    every = np.arange(1, form.break_even(linear))
    assert ranks.tolist() == every[every % step == 0].tolist()
    assert len(ranks) == allowed.count(linear)
    if multiple == "auto":
        assert len(ranks) or not len(every)
    values = int(part * linear.values)
    fitting = ranks[form.factor_values(linear, ranks) <= values]
    assert allowed.within(linear, values) == fitting.max(initial=0)
    smallest = form.factor_values(linear, ranks[:1]).tolist() or [linear.values]
    assert [allowed.least_cost(linear)] == smallest


@FORMS
@pytest.mark.parametrize("name", RANK_ALLOCATORS)
@given(percent=st.integers(25, 99), seed=st.integers(0, 9), multiple=st.sampled_from([2, 4, 7]))
@settings(deadline=None, max_examples=15)
def test_every_allocator_gives_multiples_within_the_budget(name, form, percent, seed, multiple):
    """No plan exceeds the budget, every rank is a multiple, and of a pivoted linear so are the
    other rows where its outputs are."""
    if name == "d-rank" and form is PIVOTED:
        return
    allocator, keep = make_allocator(name, OPTIONS.get(name, {})), percent / 100
    budget = Budget(keep, form, multiple=multiple)
    try:
        plan = allocator(MODEL, make_curves(MODEL, seed, form), budget, make_cosines(MODEL, seed))
    except InfeasibleError:
        return
    assert_invariants(plan, MODEL, keep, form)
    for linear in MODEL:
        rank = plan.assignments[linear.name].rank
        assert rank % multiple == 0
        assert (linear.out_features - rank) % multiple == linear.out_features % multiple


@pytest.mark.parametrize("name", ["uniform", "threshold"])
@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_no_further_step_fits_into_the_unused_budget(name, multiple):
    """The solver chooses among multiples: what plans of all ranks, rounded down, would leave of
    half a step for every linear is spent."""
    budget = Budget(0.6, multiple=multiple)
    plan = make_allocator(name, {})(MODEL, make_curves(MODEL), budget, {})
    for linear in MODEL:
        cut = plan.assignments[linear.name]
        if cut.form != "dense":
            larger = cut.rank + multiple
            is_last = larger >= LOW_RANK.break_even(linear)
            values = linear.values if is_last else LOW_RANK.factor_values(linear, larger)
            assert values - cut.stored_values(linear) > plan.slack_values


@FORMS
@given(seed=st.integers(0, 200), multiple=st.sampled_from([2, 3]))
@settings(deadline=None, max_examples=15)
def test_no_plan_of_multiples_that_stores_as_little_loses_less(form, seed, multiple):
    """At budgets that end at corners of hulls the plan spends all values, and is the optimum over
    multiples, compared with all plans of them."""
    curves, allowed = make_curves(TINY, seed), AllowedRanks(form, multiple)
    keys = np.concatenate([Threshold().keys(each, curves[each.name], allowed) for each in TINY])
    costs = np.concatenate([step_costs(each, allowed) for each in TINY])
    dense = sum(each.values for each in TINY)
    for level in np.quantile(keys, [0.4, 0.6, 0.8]):
        corner = int(costs[keys <= level].sum())
        budget = Budget((corner + 0.5) / dense, form, multiple=multiple)
        if corner < sum(map(allowed.least_cost, TINY)):
            continue
        plan = Threshold()(TINY, curves, budget, {})
        if any(k[0] > level for k in (Threshold().keys(x, curves[x.name], allowed) for x in TINY)):
            continue  # a first step is taken before its turn
        assert plan.slack_values == 0
        others = every_plan(TINY, corner, multiple, form)
        best = min(sum(lost(a[n], curve) for n, curve in curves.items()) for a in others)
        bound = 1e-12 * sum(curve.total for curve in curves.values())
        assert summed_loss(plan, curves) == pytest.approx(best, rel=1e-9, abs=bound)


@FORMS
@pytest.mark.parametrize("seed", range(5))
def test_the_predicted_loss_grows_with_the_multiple(form, seed):
    """A plan of multiples of 2 N is one of multiples of N too, so that the best one of these with
    the same values, and those of a step that need not fit, loses no more."""
    linears = make_model({"q": (96, 64), "up": (160, 64)}, blocks=4)
    curves = {
        each.name: make_curve(each.name, 10.0 ** (i / 4) * np.exp(-np.arange(64) / (5 + seed)))
        for i, each in enumerate(linears)
    }
    dense = sum(each.values for each in linears)
    for keep in (0.3, 0.45, 0.6):
        coarse = Threshold()(linears, curves, Budget(keep, form, multiple=8), {})
        for multiple in (4, 2, 1):
            step = multiple * max(each.rank_cost for each in linears)
            budget = Budget((coarse.stored_values + step) / dense, form, multiple=multiple)
            finer = Threshold()(linears, curves, budget, {})
            assert finer.stored_values >= coarse.stored_values
            assert summed_loss(finer, curves) <= summed_loss(coarse, curves)
            coarse = finer


def test_a_linear_without_an_allowed_rank_stays_dense():
    """Break-even of 24 x 48 is 16: no multiple of 16 is below, while the others get theirs."""
    plan = Threshold()(MODEL, make_curves(MODEL), Budget(0.8, multiple=16), {})
    for linear in MODEL:
        assignment = plan.assignments[linear.name]
        if LOW_RANK.break_even(linear) <= 16:
            assert assignment.form == "dense"
        else:
            assert assignment.rank in (0, 16)
    with pytest.raises(InfeasibleError, match="rank_multiple 16"):
        Threshold()(MODEL, make_curves(MODEL), Budget(0.5, multiple=16), {})


def test_samples_of_a_curve_are_multiples():
    """And the largest multiple below break-even is one; the stated error holds at every rank."""
    (linear,) = make_linears([(700, 500)])
    curve, allowed = make_curves([linear])[linear.name], AllowedRanks(multiple=8)
    last = int(allowed.of(linear)[-1])
    for most in (4, 16, 1000):
        found = sample_curve(curve, last, most, step=8)
        assert not (found.ranks % 8).any()
        assert found.ranks[-1] == last
        gaps = [found.loss(rank) - curve.loss(rank) for rank in range(last)]
        assert max(gaps) <= (found.error + 1e-6) * curve.total
