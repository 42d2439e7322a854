"""CAP's allocator: projections, the greedy choice, and the estimator of mask losses."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from allocation import assert_invariants, make_linears, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.sparsity.bernoulli import (
    initial,
    make_pool,
    project,
)
from orchestrator.allocate.sparsity.cap import CapAllocator
from orchestrator.allocate.sparsity.choice import choose
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.forms import LOW_RANK, LOW_RANK_SPARSE

PROJECTIONS = ("shift", "euclid", "multiplicative")


def make_candidates(linear, rng, buckets=5, largest=6):
    """Random candidates of one linear, with descending utilities of each kind."""
    rank = min(linear.out_features, linear.in_features)
    scale = 10 ** rng.uniform(-2, 2)
    return Candidates(
        direction_utilities=np.sort(rng.exponential(size=rank))[::-1] * scale,
        direction_magnitudes=np.sort(rng.exponential(size=rank))[::-1],
        bucket_counts=rng.integers(1, largest, size=buckets),
        bucket_utilities=np.sort(rng.exponential(size=buckets))[::-1] * scale,
        bucket_magnitudes=rng.exponential(size=buckets),
        energy=scale * rng.exponential(),
    )


def random_pool(linears, seed=0, **sizes):
    rng = np.random.default_rng(seed)
    return make_pool(linears, {each.name: make_candidates(each, rng, **sizes) for each in linears})


SMALL = make_linears([(4, 6), (6, 4), (5, 5)])


def test_candidates_and_pools_round_trip():
    """Candidates go to JSON and back; a pool's values split by linear and join again."""
    candidates = make_candidates(SMALL[0], np.random.default_rng(1))
    again = Candidates.from_json(candidates.to_json())
    for name in Candidates.__slots__:
        assert np.array_equal(getattr(again, name), getattr(candidates, name))
    assert again.bucket_counts.dtype == np.int64
    pool = random_pool(SMALL)
    parts = pool.split(pool.utility_N)
    assert [len(part) for part in parts[SMALL[1].name]] == [4, 5]
    assert np.array_equal(pool.join(parts), pool.utility_N)
    assert np.array_equal(pool.join(pool.split(pool.cost_N)), pool.cost_N)


@pytest.mark.parametrize("projection", PROJECTIONS)
@given(seed=st.integers(0, 99), percent=st.integers(5, 95))
@settings(deadline=None, max_examples=40)
def test_a_projection_spends_the_budget(projection, seed, percent):
    """The expected stored values approach the budget from below; every s is a probability."""
    pool = random_pool(SMALL, seed)
    budget = int(pool.weight_N.sum() * percent / 100)
    probability_N = np.random.default_rng(seed).normal(0.5, 1, size=len(pool.owner_N))
    found_N = project(pool, probability_N, budget, projection)
    assert np.all((found_N >= 0) & (found_N <= 1))
    assert budget * (1 - 1e-9) <= found_N @ pool.weight_N <= budget * (1 + 1e-15)
    if projection == "shift":
        order = np.argsort(probability_N)
        assert np.all(np.diff(found_N[order]) >= 0)


@pytest.mark.parametrize("projection", ["shift", "euclid"])
@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_projection_is_the_nearest_point(projection, seed):
    """It satisfies the Karush-Kuhn-Tucker conditions: one multiplier for all s inside (0, 1), and
    the right sign of the slope at the bounds."""
    pool = random_pool(SMALL, seed)
    probability_N = np.random.default_rng(seed).normal(0.5, 0.6, size=len(pool.owner_N))
    budget = int(pool.weight_N.sum()) // 2
    found_N = project(pool, probability_N, budget, projection)
    # minimise Σ metric (s - s0)² under Σ weight s = K: metric (s0 - s) = ν weight inside
    metric_N = pool.weight_N if projection == "shift" else pool.count_N
    slope_N = metric_N * (probability_N - found_N) / pool.weight_N
    inside_N = (found_N > 1e-12) & (found_N < 1 - 1e-12)
    nu = slope_N[inside_N].mean()
    assert slope_N[inside_N] == pytest.approx(nu, abs=1e-9)
    assert np.all(slope_N[found_N <= 1e-12] <= nu + 1e-9)
    assert np.all(slope_N[found_N >= 1 - 1e-12] >= nu - 1e-9)


def test_a_projection_is_nearest_by_brute_force():
    """No point of a fine grid on the budget is nearer, for two candidates of different cost."""
    linear = make_linears([(2, 3)])[0]
    one = np.ones(1)
    candidates = Candidates(
        direction_utilities=one,
        direction_magnitudes=one,
        bucket_counts=np.array([2]),
        bucket_utilities=one,
        bucket_magnitudes=one,
        energy=1.0,
    )
    pool = make_pool([linear], {linear.name: candidates})
    probability_N, budget = np.array([0.9, 0.7]), 3
    grid = np.linspace(0, 1, 100_001)
    points = np.stack([grid, (budget - 5 * grid) / 2])
    points = points[:, (points[1] >= 0) & (points[1] <= 1)]
    for projection, metric in (("shift", [5, 2]), ("euclid", [1, 2])):
        distances = np.array(metric) @ (points - probability_N[:, None]) ** 2
        best = points[:, distances.argmin()]
        assert project(pool, probability_N, budget, projection) == pytest.approx(best, abs=2e-5)


def test_a_budget_for_everything_keeps_everything():
    """All probabilities are 1 if the whole pool fits."""
    pool = random_pool(SMALL)
    probability_N = np.zeros(len(pool.owner_N))
    for projection in PROJECTIONS:
        whole = project(pool, probability_N, int(pool.weight_N.sum()), projection)
        assert np.array_equal(whole, np.ones_like(probability_N))


def greedy(pool, probability_N, budget):
    """Greedy choice, draw by draw, by its definition; no linear may become dense."""
    draws = [
        (-probability_N[n], -pool.utility_N[n], n)
        for n in range(len(probability_N))
        for _ in range(pool.count_N[n])
    ]
    draws.sort()
    first, ranks = {}, dict.fromkeys(range(len(pool.linears)), 0)
    for _, _, n in draws:
        if pool.is_direction_N[n]:
            first.setdefault(pool.owner_N[n], n)
    kept_N = np.zeros_like(pool.count_N)
    for n in [*first.values()]:
        kept_N[n], budget, ranks[pool.owner_N[n]] = 1, budget - pool.cost_N[n], 1
    for _, _, n in draws:
        if n in first.values() or pool.cost_N[n] > budget:
            continue
        if pool.is_direction_N[n]:
            owner = pool.owner_N[n]
            if ranks[owner] == LOW_RANK.break_even(pool.linears[owner]) - 1:
                continue
            ranks[owner] += 1
        kept_N[n] += 1
        budget -= pool.cost_N[n]
    return kept_N


@given(seed=st.integers(0, 500), percent=st.integers(30, 70))
@settings(deadline=None, max_examples=150)
def test_the_choice_is_the_greedy_one(seed, percent):
    """If no linear becomes dense it equals a walk over single draws."""
    linears = make_linears([(8, 12), (12, 8), (10, 10)])
    pool = random_pool(linears, seed, buckets=4, largest=9)
    probability_N = np.random.default_rng(seed).choice([0.1, 0.4, 0.4001, 0.8], len(pool.owner_N))
    budget = Budget(percent / 100).share(linears)
    choice = choose(pool, probability_N, budget)
    if not choice.dense:
        assert np.array_equal(choice.kept_N, greedy(pool, probability_N, budget))


def test_the_choice_is_optimal_for_equal_costs():
    """With equal costs and probabilities as gains no set of the same size has a larger sum."""
    linear = make_linears([(20, 20)])[0]
    none = np.zeros(0)
    rng = np.random.default_rng(0)
    gains = rng.permutation(np.linspace(0.1, 0.9, 8))
    candidates = Candidates(
        direction_utilities=np.ones(8),
        direction_magnitudes=np.ones(8),
        bucket_counts=none.astype(np.int64),
        bucket_utilities=none,
        bucket_magnitudes=none,
        energy=1.0,
    )
    pool = make_pool([linear], {linear.name: candidates})
    choice = choose(pool, gains, 4 * 40 + 39)
    best = max(itertools.combinations(range(8), 4), key=lambda kept: gains[list(kept)].sum())
    assert np.flatnonzero(choice.kept_N).tolist() == sorted(best)


MODEL = make_model(
    {"self_attn.q_proj": (24, 24), "mlp.gate_proj": (40, 24), "mlp.down_proj": (24, 40)}, blocks=2
)


@given(percent=st.integers(1, 100), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=100)
def test_the_budget_is_met_from_below(percent, seed):
    """Every plan stores at most the budget, with any dense linears, or the budget is infeasible."""
    rng = np.random.default_rng(seed)
    candidates = {each.name: make_candidates(each, rng, 8, 120) for each in MODEL}
    try:
        plan = CapAllocator()(MODEL, candidates, Budget(percent / 100, LOW_RANK_SPARSE), {})
    except InfeasibleError:
        assert percent < 20
        return
    assert_invariants(plan, MODEL, percent / 100)
    for linear in MODEL:
        assignment = plan.assignments[linear.name]
        if assignment.form != "dense":
            assert assignment.stored_values(linear) < linear.values
    if percent == 100:
        assert {assignment.form for assignment in plan.assignments.values()} == {"dense"}


def test_the_start_prefers_utility():
    """At the greedy break point a probability is one half; it increases with utility."""
    pool = random_pool(MODEL)
    budget = int(pool.weight_N.sum()) // 2
    probability_N = initial(pool, budget, "utility", 0.5)
    order = np.argsort(-pool.utility_N, kind="stable")
    assert np.all(np.diff(probability_N[order]) <= 0)
    spent = np.cumsum(pool.weight_N[order])
    assert probability_N[order][np.searchsorted(spent, budget)] == 0.5
    magnitude_N = initial(pool, budget, "magnitude", 0.5)
    assert magnitude_N.min() >= 0.05
    assert magnitude_N.max() == 0.95
    assert set(initial(pool, budget, "constant", 0.5)) == {0.5}


@pytest.mark.parametrize("across", ["linear", "relative", "absolute"])
def test_linears_compare_by_the_requested_scale(across):
    """A linear with energies a million times larger displaces the others only in absolute terms;
    relative to their own linears' break points all start with the same kept fraction."""
    rng = np.random.default_rng(5)
    linears = make_linears([(60, 60)] * 3)
    candidates = {each.name: make_candidates(each, rng, 64, 100) for each in linears}

    def plan(factors):
        scaled = {
            name: replace(
                part,
                direction_utilities=part.direction_utilities * factor,
                bucket_utilities=part.bucket_utilities * factor,
                energy=part.energy * factor,
            )
            for (name, part), factor in zip(candidates.items(), factors, strict=True)
        }
        return CapAllocator(across=across)(linears, scaled, Budget(0.5, LOW_RANK_SPARSE), {})

    # powers of two are exact
    one, other = plan([2.0**-20, 1, 2.0**20]), plan([2.0**20, 1, 2.0**-20])
    assert (one == other) == (across != "absolute")
    if across == "linear":
        stored = [one.assignments[each.name].stored_values(each) for each in linears]
        # the two sides of a break point: a direction, a bucket
        assert stored == pytest.approx([1800] * 3, abs=120 + 100)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "random"}, "constant, magnitude, utility"),
        ({"iterations": -1}, "whole number"),
        ({"samples": 0}, "whole number"),
        ({"temperature": 0}, "0.001"),
        ({"stage2": 1}, "true or false"),
        ({"projection": "none"}, "euclid, multiplicative, shift"),
    ],
)
def test_options_are_checked(options, said):
    """An invalid value is named with the allowed ones."""
    with pytest.raises(UsageError, match=said):
        CapAllocator(**options)
