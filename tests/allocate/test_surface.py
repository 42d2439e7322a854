"""Ranks and entries under one budget: laws, and the least summed loss by brute force."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
from allocation import assert_invariants, make_linears, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate import ALLOCATORS, make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.sparsity.two_sided import TwoSidedSparseAllocator
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import LOW_RANK, LOW_RANK_SPARSE
from orchestrator.plan.plan import Plan
from orchestrator.plan.surface import Surface

ALLOCATE = TwoSidedSparseAllocator()
SHARES = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
MODEL = make_model({"q": (12, 12), "k": (4, 12), "up": (24, 10), "down": (10, 24)}, blocks=3)


def make_surface(linear, rng):
    """Make losses that fall with entries and rank, on different scales; convex or not."""
    steep, size, points = rng.uniform(0.5, 4), 10 ** rng.uniform(0, 4), []
    falls = np.sort(rng.uniform(0, 1, len(SHARES)))[::-1]
    falls[0], falls[-1] = 1, 0
    for share, fall in zip(SHARES, falls.tolist(), strict=True):
        nonzeros = int(share * linear.values)
        free = (linear.values - nonzeros - 1) // linear.rank_cost
        most = min(LOW_RANK.break_even(linear) // 2, free) if share < 0.8 else 0
        for rank in sorted({0, most // 3, most}):
            gain = np.exp(-steep * rng.uniform(0.2, 2) * rank / max(LOW_RANK.break_even(linear), 1))
            points.append((nonzeros, rank, size * fall * gain))
    nonzeros, ranks, losses = (np.array(column) for column in zip(*points, strict=True))
    return Surface(
        name=linear.name,
        nonzeros=nonzeros,
        ranks=ranks,
        losses=losses,
        activation_losses=2.0 * losses,
        weight_losses=3.0 * losses,
    )


def make_surfaces(linears, seed=0):
    rng = np.random.default_rng(seed)
    return {linear.name: make_surface(linear, rng) for linear in linears}


def lost(assignment, surface):
    if assignment.form == "dense":
        return 0.0
    return surface.loss(assignment.rank, assignment.nonzeros)


def summed(assignments, surfaces):
    return sum(lost(assignments[name], surface) for name, surface in surfaces.items())


def run(linears, keep, surfaces=None):
    return ALLOCATE(linears, surfaces or make_surfaces(linears), Budget(keep, LOW_RANK_SPARSE), {})


def test_it_stands_in_the_table():
    """The allocator is a frozen class without options, for linears with ranks and entries."""
    assert ALLOCATORS["two-sided-sparse"] is TwoSidedSparseAllocator
    assert fields(TwoSidedSparseAllocator) == ()
    assert make_allocator("two-sided-sparse", {}, "low_rank_sparse") == ALLOCATE
    with pytest.raises(UsageError, match="ranks and entries together"):
        make_allocator("two-sided-sparse", {}, "sparse")


def test_a_surface_goes_to_json_and_back():
    """The JSON round trip is exact, with integer counts."""
    surface = make_surface(MODEL[0], np.random.default_rng(0))
    again = Surface.from_json(surface.to_json())
    assert again.name == surface.name
    for name in Surface.__slots__[1:]:
        assert np.array_equal(getattr(again, name), getattr(surface, name))
        assert getattr(again, name).dtype == getattr(surface, name).dtype


def test_between_points_norms_are_interpolated():
    """Roots of losses are interpolated; a point with more loss than an earlier one is skipped."""
    surface = Surface(
        name="a",
        nonzeros=np.array([0, 0, 0, 10, 20]),
        ranks=np.array([0, 2, 4, 0, 0]),
        losses=np.array([9.0, 4.0, 1.0, 1.0, 4.0]),
        activation_losses=np.array([8.0, 4.0, 2.0, 2.0, 0.0]),
        weight_losses=np.zeros(5),
    )
    found = [surface.loss(0, count) for count in (0, 5, 10, 15, 20, 30)]
    assert found == [9.0, 4.0, 1.0, 1.0, 1.0, 1.0]
    assert [surface.loss(rank, 0) for rank in (1, 2, 3, 4)] == [6.25, 4.0, 2.25, 1.0]
    assert surface.largest_ranks() == {0: 4}
    assert surface.errors(4, 0) == {"activation_error": pytest.approx(0.25), "weight_error": 0.0}


@given(percent=st.integers(1, 100), seed=st.integers(0, 30))
@settings(deadline=None, max_examples=40)
def test_the_laws(percent, seed):
    """Excess values stay unused, forms match the kept parts; or the budget is infeasible."""
    try:
        plan = run(MODEL, percent / 100, make_surfaces(MODEL, seed))
    except InfeasibleError:
        return
    assert_invariants(plan, MODEL, percent / 100)
    assert plan.slack_values < max(linear.values for linear in MODEL) / 2
    assert Plan.from_json(plan.to_json()) == plan
    for linear in MODEL:
        each = plan.assignments[linear.name]
        kept = {"dense": (0, 0), "sparse": (0, 1), "low_rank": (1, 0), "low_rank_sparse": (1, 1)}
        assert (min(each.rank, 1), min(each.nonzeros, 1)) == kept[each.form]
        assert each.stored_values(linear) < linear.values or each.form == "dense"
        assert each.stored_values(linear) >= linear.rank_cost


def test_more_budget_never_means_less():
    """No linear's stored values fall as the budget grows, and no loss rises."""
    surfaces = make_surfaces(MODEL)
    before = None
    for percent in range(32, 101):
        plan = run(MODEL, percent / 100, surfaces)
        sizes = np.array([plan.assignments[each.name].stored_values(each) for each in MODEL])
        loss = summed(plan.assignments, surfaces)
        if before is not None:
            assert np.all(sizes >= before[0])
            assert loss <= before[1] * (1 + 1e-12)
        before = sizes, loss
    assert {each.form for each in plan.assignments.values()} == {"dense"}


def test_blocks_may_be_exchanged():
    """Exchanging the surfaces of two blocks exchanges their assignments."""
    surfaces = make_surfaces(MODEL)
    other = {each.name: f"blocks.{(each.block + 1) % 3}.{each.role}" for each in MODEL}
    moved = {name: replace(surfaces[other[name]], name=name) for name in other}
    plan, after = run(MODEL, 0.6, surfaces), run(MODEL, 0.6, moved)
    assert after.assignments == {name: plan.assignments[other[name]] for name in other}


def test_linears_that_cost_as_much_as_their_factors_stay_dense():
    """If rank 1 reaches break-even, only the dense weight can be chosen."""
    linears = make_linears([(2, 2), (1, 9), (12, 12)])
    plan = run(linears, 0.5)
    forms = [plan.assignments[each.name].form for each in linears]
    assert forms[:2] == ["dense", "dense"]
    assert forms[2] != "dense"


def test_impossible_budgets_are_refused():
    """Budgets below rank 1 everywhere, and outside (0, 1], are refused."""
    with pytest.raises(InfeasibleError, match="rank 1 for each"):
        run(MODEL, 0.05)
    for keep in (0.0, 1.5):
        with pytest.raises(UsageError, match="keep"):
            run(MODEL, keep)


def points(linear, surface):
    """Return stored values and losses at all measured points, the dense one and the minimum."""
    cost, least = (
        linear.rank_cost,
        min(surface.loss(rank, count) for rank, count in ((0, linear.rank_cost), (1, 0))),
    )
    stored = LOW_RANK.factor_values(linear, surface.ranks) + surface.nonzeros
    losses = zip(stored.tolist(), surface.losses.tolist(), strict=True)
    within = [point for point in losses if cost < point[0] < linear.values]
    return [(cost, least), *sorted(within), (linear.values, 0.0)]


@given(seed=st.integers(0, 500))
@settings(deadline=None, max_examples=30)
def test_no_plan_at_measured_points_loses_less(seed):
    """At every price per value the plan minimises loss plus price, and no other choice of points
    has less loss with as many values."""
    linears = make_linears([(9, 6), (5, 8), (7, 7)])
    surfaces = make_surfaces(linears, seed)
    choices = [points(linear, surfaces[linear.name]) for linear in linears]
    first, second, third = (np.array(each) for each in choices)
    plans = (first[:, None, None] + second[:, None] + third).reshape(-1, 2)
    pairs = [pair for each in choices for pair in itertools.combinations(each, 2)]
    slopes = sorted({max((a[1] - b[1]) / (b[0] - a[0]), 0.0) for a, b in pairs})
    for low, high in itertools.pairwise([*slopes, 2 * slopes[-1]]):
        price = (low + high) / 2
        best = [min(each, key=lambda point: point[1] + price * point[0]) for each in choices]
        budget, least = np.sum(best, axis=0)
        keep = (budget + 0.5) / sum(each.values for each in linears)
        plan = run(linears, min(keep, 1.0), surfaces)
        assert plan.stored_values <= budget
        assert summed(plan.assignments, surfaces) <= least * (1 + 1e-9)
        assert least <= plans[plans[:, 0] <= budget, 1].min() * (1 + 1e-9)


@pytest.mark.parametrize("codec", [CODECS["bfloat16"], CODECS["float32"]])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_bytes_of_indices_count(share, codec):
    """Stored values with their indices fit from below."""
    surfaces = make_surfaces(MODEL)
    budget = Budget(share, LOW_RANK_SPARSE, in_bytes=True)
    plan = fill_budget(lambda each: ALLOCATE(MODEL, surfaces, each, {}), MODEL, budget, codec)
    stored = sum(plan.assignments[each.name].stored_bytes(each, codec) for each in MODEL)
    dense = codec.bytes(sum(each.values for each in MODEL))
    assert 0.9 * share * dense < stored <= share * dense
