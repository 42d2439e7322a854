"""Budgets of operations and of measured time: closed forms, laws, and the optimum."""

import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from allocation import (
    RANK_ALLOCATORS,
    every_plan,
    lost,
    make_cosines,
    make_curve,
    make_curves,
    make_linears,
    make_model,
    make_table,
)
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget, plan_cost
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.steps import step_costs
from orchestrator.allocate.threshold import Threshold
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError, InputError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.cost import CACHE, OPERATIONS, VALUES, TimeCost, isotonic, picoseconds
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.latency_table import parse_latency_table
from orchestrator.plan.plan import Assignment

MODEL = make_model({"q_proj": (48, 48), "k_proj": (16, 48), "down_proj": (48, 96)}, blocks=3)
TINY = make_model({"up_proj": (10, 8), "down_proj": (8, 12)}, blocks=2)
FORMS = pytest.mark.parametrize("form", [LOW_RANK, PIVOTED], ids=lambda form: form.name)
BF16 = CODECS["bfloat16"]
OPTIONS = {"mgaa": {"low": 0.05, "high": 1.0}, "strs": {"grid": "0.1 0.2 0.4 0.6 0.8"}}
CALL = 1e-7
"""Seconds of a call in the tables below; a value takes a nanosecond."""


def time_cost(linears, *, bumps=0.0, call=CALL):
    """Return the time of two calls and 1 ns a value, of one call dense; odd ranks may be slower."""

    def factored(form):
        return lambda linear, rank: (
            2 * call + 1e-9 * form.factor_values(linear, rank) + bumps * call * (rank % 4 == 1)
        )

    forms = {form.name: factored(form) for form in (LOW_RANK, PIVOTED)}
    table = make_table(linears, lambda each: call + 1e-9 * each.values, forms)
    return TimeCost(parse_latency_table(table, "table.json"))


def fill(name, linears, budget, curves=None):
    curves = curves or make_curves(linears, form=budget.form)
    allocator, cosines = make_allocator(name, OPTIONS.get(name, {})), make_cosines(linears)
    return fill_budget(
        lambda each: allocator(linears, curves, each, cosines),
        *(linears, budget, BF16),
        divides_costs=allocator.divides_costs,
    )


def spent(plan, linears, cost):
    return plan_cost(linears, plan.assignments, cost)


def test_operations_are_those_of_the_modules():
    """A basis is multiplied by every linear that shares it; entries are multiplied as a dense
    weight; two factors take as many operations as they have values."""
    (linear,) = make_linears([(30, 20)])
    cuts = {
        Assignment(form="dense"): 600,
        Assignment(form="low_rank", rank=7): 7 * 50,
        Assignment(form="low_rank", rank=7, basis="other"): 7 * 50,
        Assignment(form="pivoted", rank=7): 7 * 50 - 49,
        Assignment(form="sparse", nonzeros=9): 600,
        Assignment(form="low_rank_sparse", rank=7, nonzeros=9): 600 + 7 * 50,
    }
    assert {cut: OPERATIONS.of(linear, cut) for cut in cuts} == cuts


@FORMS
def test_an_expert_costs_its_part_of_the_tokens(form):
    """Three eighths of operations and time, rounded up, dense and at every rank; the same ranks are
    allowed."""
    (linear,) = make_linears([(30, 20)])
    expert, ranks = replace(linear, routed=Fraction(3, 8)), np.arange(1, 12)
    for cost in (OPERATIONS, time_cost([linear], bumps=1.0)):
        pairs = [(cost.dense(linear), cost.dense(expert))]
        pairs += [(cost.factors(each, form, ranks) for each in (linear, expert))]
        cut = Assignment(form=form.name, rank=7)
        pairs += [(cost.of(linear, cut), cost.of(expert, cut))]
        for whole, part in pairs:
            assert np.array_equal(part, np.ceil(whole * 3 / 8))
        allowed = AllowedRanks(form, cost=cost)
        assert allowed.count(expert) == allowed.count(linear) > 0


def test_experts_get_the_ranks_that_their_operations_leave():
    """If all linears see half of the tokens, the plan is that of all tokens, as all costs are even;
    of two equal linears the one that sees fewer gets the larger rank."""
    halved = [replace(each, routed=Fraction(1, 2)) for each in MODEL]
    for name in ("threshold", "uniform"):
        plans = [fill(name, model, Budget(0.6, cost=OPERATIONS)) for model in (MODEL, halved)]
        assert plans[0].assignments == plans[1].assignments
    one, other = make_linears([(64, 64), (64, 64)])
    other = replace(other, routed=Fraction(1, 8))
    energies = np.geomspace(1, 1e-3, 64)
    curves = {each.name: make_curve(each.name, energies) for each in (one, other)}
    plan = fill("threshold", [one, other], Budget(0.5, cost=OPERATIONS), curves).assignments
    assert plan[one.name].form == "low_rank"
    assert plan[other.name].form == "dense" or plan[other.name].rank > plan[one.name].rank


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_isotonic_regression_is_the_least_squares_fit(values):
    """Each value is the largest, over the starts before it, of the smallest mean up to an end
    after it: the min-max formula. A sequence that does not fall stays as it is."""
    found, array = isotonic(np.array(values)), np.array(values)
    places = range(len(values))
    expected = [
        max(min(array[a : b + 1].mean() for b in places[i:]) for a in places[: i + 1])
        for i in places
    ]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert isotonic(np.sort(array)).tolist() == sorted(values)


def test_times_are_measured_ones_and_interpolated_between():
    """Exact at measured ranks, half between two, that of the first below it; a rank above the last
    one is not faster than dense."""
    (linear,) = make_linears([(40, 40)])
    rows = [[4, 2e-6], [8, 3e-6], [12, 7e-6]]
    entry = {"shape": [40, 40], "dense_seconds": 9e-6, "forms": {"low_rank": rows}}
    about = {"format_version": 1, "device": "cpu", "dtype": "float32", "threads": 1, "tokens": 1}
    cost = TimeCost(parse_latency_table({**about, "linears": [entry]}, "table.json"))
    for rank, seconds in [(4, 2e-6), (8, 3e-6), (12, 7e-6), (6, 2.5e-6), (11, 6e-6), (1, 2e-6)]:
        assert cost.factors(linear, LOW_RANK, rank) == picoseconds(seconds)
        assert cost.of(linear, Assignment(form="low_rank", rank=rank)) == picoseconds(seconds)
    assert cost.dense(linear) == picoseconds(9e-6)
    assert cost.factors(linear, LOW_RANK, 13) >= cost.dense(linear)
    assert AllowedRanks(LOW_RANK, 1, cost).of(linear).tolist() == [*range(1, 13)]
    # a form that was not measured has no allowed rank
    assert AllowedRanks(PIVOTED, 1, cost).count(linear) == 0


@FORMS
def test_ranks_are_allowed_below_the_time_of_dense(form):
    """The first ones, also where noise makes a smaller rank slower; the steps of a linear add up
    to its dense time, and none has a negative cost."""
    cost = time_cost(MODEL, bumps=5.0)
    allowed = AllowedRanks(form, 1, cost)
    for linear in MODEL:
        every = np.arange(1, form.break_even(linear))
        faster = cost.factors(linear, form, every) < cost.dense(linear)
        assert allowed.of(linear).tolist() == every[faster].tolist()
        assert faster.tolist() == sorted(faster, reverse=True)
        costs = step_costs(linear, allowed)
        assert costs.min() >= 0
        assert costs.sum() == cost.dense(linear)
        half = cost.dense(linear) // 2
        within = [r for r in every[faster] if cost.factors(linear, form, int(r)) <= half]
        assert allowed.within(linear, half) == max(within, default=0)


@FORMS
def test_operations_of_factors_are_their_values(form):
    """The plan of a fraction of operations is that of the same fraction of values; of an allocator
    that is bisected it fills the budget at least as well."""
    for kept in (0.3, 0.55, 0.8, 1.0):
        plan = fill("threshold", MODEL, Budget(kept, form, cost=OPERATIONS))
        same = fill("threshold", MODEL, Budget(kept, form))
        assert plan.assignments == same.assignments
        assert plan.stored_values == plan.budget_values == same.stored_values
        even = fill("uniform", MODEL, Budget(kept, form, cost=OPERATIONS)).stored_values
        assert (
            fill("uniform", MODEL, Budget(kept, form)).stored_values <= even <= same.budget_values
        )


@FORMS
@pytest.mark.parametrize("name", RANK_ALLOCATORS)
@pytest.mark.parametrize("kind", ["operations", "time", "cache"])
def test_every_allocator_meets_the_budget(name, kind, form):
    """Within the cost; a linear whose factors would cost no less is dense, and all are at 1."""
    if name == "d-rank" and form is PIVOTED:
        return
    known = {"operations": OPERATIONS, "cache": CACHE}
    cost = known.get(kind) or time_cost(MODEL, bumps=1.0)
    dense = sum(map(cost.dense, MODEL))
    for kept in (0.5, 0.75, 1.0):
        plan = fill(name, MODEL, Budget(kept, form, cost=cost))
        assert spent(plan, MODEL, cost) <= kept * dense
        for linear in MODEL:
            cut = plan.assignments[linear.name]
            assert cut.form == "dense" or cost.of(linear, cut) < cost.dense(linear)
            assert cut.form == "dense" or 1 <= cut.rank < form.break_even(linear)
    assert plan.forms == {"dense"}


@FORMS
def test_the_unused_time_is_below_the_next_step(form):
    """And a larger budget never gives a smaller rank, more unused time or a larger loss."""
    cost, curves = time_cost(MODEL), make_curves(MODEL, form=form)
    allowed, dense = AllowedRanks(form, 1, cost), sum(map(cost.dense, MODEL))
    before = None
    for percent in range(40, 101, 3):
        budget = Budget(percent / 100, form, cost=cost)
        plan = Threshold()(MODEL, curves, budget, {})
        left = budget.share(MODEL) - spent(plan, MODEL, cost)
        cuts = [plan.assignments[each.name] for each in MODEL]
        steps = [
            step_costs(each, allowed)[cut.rank]
            for each, cut in zip(MODEL, cuts, strict=True)
            if cut.form != "dense"
        ]
        assert left < max(steps, default=1)
        sizes = np.array([cost.of(each, cut) for each, cut in zip(MODEL, cuts, strict=True)])
        loss = sum(lost(cut, curves[each.name]) for each, cut in zip(MODEL, cuts, strict=True))
        assert before is None or (np.all(sizes >= before[0]) and loss <= before[1])
        before = sizes, loss
    assert sizes.sum() == dense


def test_bisection_finds_the_largest_fraction():
    """No uniform plan of a finer grid of fractions that is within the time takes longer."""
    cost = time_cost(MODEL)
    budget = Budget(0.7, cost=cost)
    found = spent(fill("uniform", MODEL, budget), MODEL, cost)
    for kept in np.linspace(0.2, 1, 300):
        plan = Uniform()(MODEL, {}, Budget(float(kept)), {})
        times = [min(cost.of(e, plan.assignments[e.name]), cost.dense(e)) for e in MODEL]
        assert sum(times) > budget.share(MODEL) or sum(times) <= found


@FORMS
@pytest.mark.parametrize("seed", range(4))
def test_no_plan_that_takes_as_little_time_loses_less(form, seed):
    """At budgets that end at corners of hulls the plan takes all of the time, and is the optimum,
    compared with all plans."""
    rng, cost = np.random.default_rng(seed), time_cost(TINY, call=1e-8)
    curves = {
        each.name: make_curve(each.name, np.exp(-np.arange(8) / rng.uniform(2, 6))) for each in TINY
    }
    allowed, dense = AllowedRanks(form, 1, cost), sum(map(cost.dense, TINY))
    keys = [Threshold().keys(each, curves[each.name], allowed) for each in TINY]
    costs = np.concatenate([step_costs(each, allowed) for each in TINY])
    others = [
        (
            sum(cost.of(each, cuts[each.name]) for each in TINY),
            sum(lost(cuts[each.name], curves[each.name]) for each in TINY),
        )
        for cuts in every_plan(TINY, sum(each.values for each in TINY), form=form)
    ]
    every = np.unique(np.concatenate(keys))
    # below, a first step would be taken before its turn
    levels = every[every >= max(key[0] for key in keys)]
    assert len(levels) > 3
    for level in levels:
        corner = int(costs[np.concatenate(keys) <= level].sum())
        budget = Budget(min((corner + 0.5) / dense, 1.0), form, cost=cost)
        plan = Threshold()(TINY, curves, budget, {})
        assert spent(plan, TINY, cost) == corner
        best = min(loss for time, loss in others if time <= corner)
        found = sum(lost(plan.assignments[each.name], curves[each.name]) for each in TINY)
        assert found == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["threshold", "uniform"])
def test_a_linear_without_a_faster_rank_stays_dense(name):
    """The calls of k_proj alone take longer than its dense product; the others pay for it."""

    def slow(each, rank):
        return 1e-9 * LOW_RANK.factor_values(each, rank) + (9e-6 if "k_proj" in each.name else 0)

    table = make_table(MODEL, lambda each: 1e-9 * each.values, {"low_rank": slow})
    cost = TimeCost(parse_latency_table(table, "table.json"))
    for kept in (0.3, 0.6, 0.9):
        plan = fill(name, MODEL, Budget(kept, cost=cost))
        forms = {each.name: plan.assignments[each.name].form for each in MODEL}
        assert {form for each, form in forms.items() if "k_proj" in each} == {"dense"}
        assert "low_rank" in forms.values()


@pytest.mark.parametrize("name", ["threshold", "uniform", "svd-llm-v2"])
def test_the_least_possible_fraction_is_stated_and_suffices(name):
    """A budget below it is infeasible; the stated one is met."""
    cost = time_cost(MODEL)
    with pytest.raises(InfeasibleError, match=r"keep_latency: 0\.01 allows .* us") as caught:
        fill(name, MODEL, Budget(0.01, cost=cost))
    least = float(re.search(r"least possible is ([\d.]+)", str(caught.value))[1])
    plan = fill(name, MODEL, Budget(least, cost=cost))
    assert spent(plan, MODEL, cost) <= least * sum(map(cost.dense, MODEL))


def test_the_grid_of_strs_is_known_before_it_is_measured():
    """Its smallest plan takes longer than that of all ranks, and is what the check states."""
    cost = time_cost(MODEL)
    strs, budget = make_allocator("strs", {"grid": "0.5 0.8"}), Budget(0.3, cost=cost)
    assert budget.total(MODEL)
    with pytest.raises(InfeasibleError, match="grid") as caught:
        strs.check_budget(MODEL, budget)
    least = float(re.search(r"least possible is ([\d.]+)", str(caught.value))[1])
    strs.check_budget(MODEL, Budget(least, cost=cost))
    sizes = [strs.ranks(each)[0] for each in MODEL]
    factors = [cost.factors(each, LOW_RANK, r) for each, r in zip(MODEL, sizes, strict=True)]
    assert least == pytest.approx(sum(factors) / sum(map(cost.dense, MODEL)), abs=2e-6)


def test_a_shape_that_was_not_measured_is_named():
    """With the linear that has it, the file and the command."""
    cost = time_cost(MODEL)
    (other,) = make_linears([(11, 13)])
    with pytest.raises(InputError, match=r"table\.json has no linear of 11 x 13.*bench MODEL"):
        Budget(0.5, cost=cost).total([*MODEL, other])


def test_values_are_the_default_cost():
    """A budget in values has the ranks and steps of before."""
    assert Budget(0.5).cost is VALUES
    assert Budget(0.5, cost=OPERATIONS).in_values(0.3) == Budget(0.3)
    for linear in MODEL:
        assert (
            step_costs(linear).tolist()
            == step_costs(linear, AllowedRanks(cost=OPERATIONS)).tolist()
        )
