"""D-Rank: effective ranks, the optimum over integers, and rebalancing of Q, K and V."""

import math

import numpy as np
import pytest
from allocation import (
    every_plan,
    lost,
    make_curve,
    make_curves,
    make_linears,
    make_model,
    size_as_rank,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.d_rank import DRankAllocator, closed_form, effective_rank, rebalance
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.forms import LOW_RANK

ATTENTION = {f"self_attn.{name}_proj": (64, 64) for name in "qkvo"}
GROUPED = {f"self_attn.{name}_proj": (64 if name == "q" else 16, 64) for name in "qkv"}
SHAPES = st.lists(st.tuples(st.integers(4, 16), st.integers(4, 16)), min_size=2, max_size=3)


def flat_curves(linears, counts):
    """Make curves with these effective ranks."""
    return {
        each.name: make_curve(each.name, np.repeat([2.0, 0.0], [n, 64 - n]))
        for each, n in zip(linears, counts, strict=True)
    }


def ranks_of(plan):
    return [assignment.rank for assignment in plan.assignments.values()]


def objective(linears, effective, assignments):
    """Compute Σ R / k; the dense weight counts as the rank of equal size."""
    return sum(
        effective[each.name] / size_as_rank(assignments[each.name], each) for each in linears
    )


@pytest.mark.parametrize(
    ("energies", "expected"),
    [
        ([5.0], 1),
        ([2.0] * 7, 7),
        ([3.0, 3.0, 0.0, 0.0], 2),
        ([3.0, 1.0], 4 / 3**0.75),
        ([2.0, 1.0, 1.0], 2**1.5),
        ([0.0, 0.0], 1),
    ],
)
def test_effective_rank_is_the_exponential_of_an_entropy(energies, expected):
    """n equal values count n, zeros do not count, and scaling has no effect."""
    (linear,) = make_linears([(len(energies), 9)])
    for scale in (1.0, 1e-9, 1e12):
        curve = make_curve("a", np.multiply(energies, scale))
        assert effective_rank(linear, curve) == pytest.approx(expected, rel=1e-12)


def test_a_cut_tail_counts_as_spread_evenly():
    """The result is exact for a flat tail, else an upper bound close to it for a small tail."""
    (linear,) = make_linears([(8, 8)])
    flat = make_curve("a", [9.0, 3.0, 1, 1, 1, 1, 1, 1])
    steep = make_curve("a", [90.0, 30.0, 1, 0.5, 0.2, 0.1, 0, 0])

    def cut(curve):
        return make_curve("a", curve.energies[:4], curve.total)

    assert effective_rank(linear, cut(flat)) == pytest.approx(effective_rank(linear, flat))
    left = 0.3 / steep.total
    ratio = effective_rank(linear, cut(steep)) / effective_rank(linear, steep)
    assert 1 < ratio < math.exp(left * math.log(4))


def test_the_closed_form_spends_the_budget_by_roots():
    """Effective ranks 36, 9 and 9 with equal costs get ranks 2 : 1 : 1."""
    linears = make_linears([(64, 64)] * 3)
    effective = {each.name: rank for each, rank in zip(linears, [36, 9, 9], strict=True)}
    ranks = closed_form(linears, effective, 40 * 128)
    assert [*ranks.values()] == pytest.approx([20, 10, 10])
    paper = DRankAllocator(setting="paper")(
        linears, flat_curves(linears, [36, 9, 9]), Budget(0.4167), cosines={}
    )
    assert ranks_of(paper) == [20, 10, 10]


def test_costs_count_under_the_root_too():
    """At equal effective ranks k is proportional to one over the root of the cost per rank."""
    linears = make_linears([(100, 100), (400, 400)])
    effective = dict.fromkeys((each.name for each in linears), 5.0)
    one, four = closed_form(linears, effective, 120_000).values()
    assert one / four == pytest.approx(2)
    assert 200 * one + 800 * four == pytest.approx(120_000)


@given(shapes=SHAPES, seed=st.integers(0, 99), keep=st.floats(0.3, 1))
@settings(deadline=None, max_examples=60)
def test_no_plan_that_stores_as_little_is_better(shapes, seed, keep):
    """Brute force over all integer ranks finds no smaller Σ R / k for as few values."""
    linears = make_linears(shapes)
    curves = make_curves(linears, seed)
    effective = {each.name: effective_rank(each, curves[each.name]) for each in linears}
    try:
        plan = DRankAllocator()(linears, curves, Budget(keep), cosines={})
    except InfeasibleError:
        return
    found = objective(linears, effective, plan.assignments)
    plans = every_plan(linears, plan.stored_values)
    assert found <= min(objective(linears, effective, each) for each in plans) + 1e-12


@given(counts=st.lists(st.integers(1, 64), min_size=3, max_size=3), keep=st.floats(0.1, 0.5))
@settings(deadline=None, max_examples=30)
def test_the_optimum_of_equal_shapes_is_that_of_the_whole_budget(counts, keep):
    """For equal costs without dense linears the result is optimal for the whole budget."""
    linears = make_linears([(24, 24)] * 3)
    curves = {
        each.name: make_curve(each.name, np.repeat([1.0], min(n, 24)))
        for each, n in zip(linears, counts, strict=True)
    }
    effective = {each.name: effective_rank(each, curves[each.name]) for each in linears}
    plan = DRankAllocator()(linears, curves, Budget(keep), cosines={})
    if any(assignment.form == "dense" for assignment in plan.assignments.values()):
        return
    found = objective(linears, effective, plan.assignments)
    plans = every_plan(linears, plan.budget_values)
    assert found <= min(objective(linears, effective, each) for each in plans) + 1e-12


@pytest.mark.parametrize("scope", ["type", "model"])
def test_ranks_follow_the_water_filling_solution(scope):
    """Every rank is min(break-even, C √(R/ω)) to within one, with one C for all."""
    linears = make_linears([(640, 640), (128, 640), (640, 640), (1280, 640), (640, 640)])
    curves = make_curves(linears, seed=3)
    plan = DRankAllocator(scope=scope)(linears, curves, Budget(0.75), cosines={})
    roots = np.sqrt([effective_rank(each, curves[each.name]) / each.rank_cost for each in linears])
    ranks = np.array(ranks_of(plan))
    dense = np.array([a.form == "dense" for a in plan.assignments.values()])
    assert dense.any()
    assert not dense.all()
    # k (k + 1) ω / R is constant at the margin: k + 1/2 follows the root
    level = np.median((ranks + 0.5)[~dense] / roots[~dense])
    assert np.all(np.abs(ranks + 0.5 - level * roots)[~dense] <= 1)
    break_even = np.array([LOW_RANK.break_even(each) for each in linears])
    assert np.all(level * roots[dense] >= break_even[dense] - 1)


def test_one_budget_for_the_model_moves_values_between_types():
    """With one budget a type of low effective rank loses values to one of high; per type it does
    not."""
    linears = make_model({"mlp.up_proj": (64, 64), "mlp.down_proj": (64, 64)}, blocks=1)
    curves = flat_curves(linears, [36, 9])
    assert ranks_of(DRankAllocator()(linears, curves, Budget(0.4688), cosines={})) == [15, 15]
    assert ranks_of(DRankAllocator(scope="model")(linears, curves, Budget(0.4688), cosines={})) == [
        20,
        10,
    ]


@given(
    held=st.tuples(*[st.integers(1, 10**9)] * 3),
    room=st.integers(0, 10**9),
    beta=st.floats(0.001, 1),
)
def test_rebalanced_budgets_are_conserved(held, room, beta):
    """Q and K give the same fraction, beta or enough to fill V; at most two values are lost."""
    most = held[2] + room
    query, key, value = rebalance(held, most, beta)
    assert sum(held) - 2 <= query + key + value <= sum(held)
    assert held[2] <= value <= most
    given = min(beta, room / (held[0] + held[1]))
    assert query == pytest.approx(held[0] * (1 - given), abs=2)
    assert key == pytest.approx(held[1] * (1 - given), abs=2)


@pytest.mark.parametrize("setting", ["exact", "paper"])
def test_with_equal_heads_the_papers_ranks_result(setting):
    """With rank 16 for all and beta 1/4, Q and K keep 12 and V gets 24; others are unchanged."""
    linears = make_model(ATTENTION, blocks=2)
    curves = flat_curves(linears, [9] * 8)
    plan = DRankAllocator(setting=setting, beta=0.25)(linears, curves, Budget(0.5), cosines={})
    assert ranks_of(plan) == [12, 12, 24, 16] * 2
    assert plan.slack_values == 0


def test_with_fewer_heads_values_are_moved_and_not_ranks():
    """Beta 0.1 of Q (16 ranks of 128 values) and K (6.4 of 80) is 3.2 ranks of V, not 2.24."""
    linears = make_model(GROUPED, blocks=1)
    curves = flat_curves(linears, [9] * 3)
    # 14.4, 5.76 and 9.6 ranks: limited by the budget of each type, or of the three together
    assert ranks_of(DRankAllocator(beta=0.1)(linears, curves, Budget(0.5), cosines={})) == [
        14,
        5,
        9,
    ]
    paper = DRankAllocator(setting="paper", beta=0.1)(linears, curves, Budget(0.5), cosines={})
    assert ranks_of(paper) == [14, 6, 10]


def test_a_full_v_leaves_the_rest_with_q_and_k():
    """Values that V cannot take stay with Q and K: V is dense, Q and K share the rest as before."""
    linears = make_model(GROUPED, blocks=1)
    plan = DRankAllocator(beta=0.5)(linears, flat_curves(linears, [9] * 3), Budget(0.5), cosines={})
    query, key, value = plan.assignments.values()
    assert value.form == "dense"
    # V had 512 of 1024 values; 512 of the 2560 of Q and K fill it
    assert (query.rank, key.rank) == (1638 // 128, 409 // 80)


def test_paper_ranks_over_break_even_are_dense_and_given_to_nobody():
    """The closed form gives 40 and 20 to two weights of break-even 32; the second keeps its 20."""
    linears = make_linears([(64, 64)] * 2)
    curves = flat_curves(linears, [36, 9])
    one, two = DRankAllocator(setting="paper")(
        linears, curves, Budget(0.9375), cosines={}
    ).assignments.values()
    assert one.form == "dense"
    assert two.rank == 20
    one, two = DRankAllocator()(linears, curves, Budget(0.9375), cosines={}).assignments.values()
    assert one.form == "dense"
    assert two.rank == 28


@given(seed=st.integers(0, 30), keep=st.floats(0.2, 0.6))
@settings(deadline=None, max_examples=30)
def test_paper_ranks_are_the_nearest_unless_the_budget_says_less(seed, keep):
    """Ranks are never above the rounded closed form, and below it only to meet the budget."""
    linears = make_linears([(60, 60)] * 5)
    curves = make_curves(linears, seed)
    effective = {each.name: effective_rank(each, curves[each.name]) for each in linears}
    plan = DRankAllocator(setting="paper")(linears, curves, Budget(keep), cosines={})
    real = np.array([*closed_form(linears, effective, plan.budget_values).values()])
    ranks, rounded = np.array(ranks_of(plan)), np.maximum(np.round(real), 1)
    low_rank = real < 29
    assert np.all(ranks[low_rank] <= rounded[low_rank])
    if rounded.sum() * 120 <= plan.budget_values:
        np.testing.assert_array_equal(ranks[low_rank], rounded[low_rank])


@pytest.mark.parametrize("setting", ["exact", "paper"])
def test_the_authors_test_compares_with_uniform_ranks(setting):
    """A type with a larger truncation loss than with uniform ranks is uniform, gate always."""
    roles = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    linears = make_model(dict.fromkeys(roles, (64, 64)), blocks=2)
    good, bad = (np.repeat([1.0, 0.0], n) for n in ([20, 44], [4, 60]))
    # up: the flat weight needs its ranks; o: it is flat but has little energy
    curves = make_curves(linears)
    for role in roles:
        for block, energies in enumerate([good, bad]):
            curves[f"blocks.{block}.{role}"] = make_curve("", energies)
    heavy = 1e6 * np.exp(-np.arange(64) / 2)
    for role in ("self_attn.q_proj", "self_attn.o_proj"):
        curves[f"blocks.1.{role}"] = make_curve("", heavy)
    dynamic = DRankAllocator(setting=setting)(linears, curves, Budget(0.4), cosines={}).assignments
    tested = DRankAllocator(setting=setting, accept="code")(
        linears, curves, Budget(0.4), cosines={}
    ).assignments
    uniform = Uniform()(linears, curves, Budget(0.4), cosines={}).assignments
    for role, expected in zip(roles, (dynamic, uniform, uniform, dynamic), strict=True):
        names = [f"blocks.{block}.{role}" for block in range(2)]
        assert [tested[name] for name in names] == [expected[name] for name in names]
        assert [dynamic[name] for name in names] != [uniform[name] for name in names]

    def loss(role, assignments):
        return sum(lost(assignments[n], curves[n]) for n in (f"blocks.{b}.{role}" for b in (0, 1)))

    assert loss("self_attn.o_proj", uniform) <= loss("self_attn.o_proj", dynamic)
    assert loss("mlp.up_proj", dynamic) < loss("mlp.up_proj", uniform)


def test_beta_needs_q_k_and_v():
    """If a family has no q, k and v, or they are not targeted, beta is refused."""
    linears = make_model({"attn.c_attn": (24, 8), "mlp.c_fc": (32, 8)}, blocks=1)
    curves = make_curves(linears)
    DRankAllocator()(linears, curves, Budget(0.5), cosines={})
    with pytest.raises(UsageError, match=r"q_proj.*none.*beta 0"):
        DRankAllocator(beta=0.3)(linears, curves, Budget(0.5), cosines={})
    linears = [each for each in make_model(ATTENTION, blocks=1) if "v_proj" not in each.name]
    with pytest.raises(UsageError, match="v_proj"):
        DRankAllocator(beta=0.3)(linears, make_curves(linears), Budget(0.5), cosines={})


def test_a_beta_that_leaves_q_below_rank_one_is_infeasible():
    """The error names the type and beta."""
    linears = make_model(ATTENTION, blocks=1)
    with pytest.raises(InfeasibleError, match=r"q_proj at beta 0\.9"):
        DRankAllocator(beta=0.9)(linears, make_curves(linears), Budget(0.2), cosines={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setting": "ours"}, "setting is 'ours'.*exact, paper"),
        ({"scope": "block"}, "scope.*model, type"),
        ({"accept": True}, "accept is True.*code, none"),
        ({"beta": 1.5}, "beta is 1.5.*0 to 1"),
        ({"beta": math.nan}, "beta is nan"),
        ({"accept": "code", "scope": "model"}, "accept.*scope"),
    ],
)
def test_an_option_outside_its_range_is_refused(options, message):
    """The message has the option, its value and the allowed values."""
    with pytest.raises(UsageError, match=f"d-rank: {message}"):
        DRankAllocator(**options)
