"""Plans among which a search chooses: the budget, the window, groups and coordinates."""

import math
from dataclasses import replace

import numpy as np
import pytest
from allocation import make_curves, make_experts, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.search import SearchAllocator, type_of
from orchestrator.allocate.threshold import Threshold
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError, UsageError

SHAPES = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (16, 48),
    "self_attn.v_proj": (16, 48),
    "self_attn.o_proj": (48, 48),
    "mlp.up_proj": (96, 48),
    "mlp.down_proj": (48, 96),
}
MODEL = make_model(SHAPES, blocks=4)
DENSE = sum(each.values for each in MODEL)
CURVES = make_curves(MODEL)
seeds = st.integers(0, 2**32 - 1)


def drawn(search, seed):
    rng = np.random.default_rng(seed)
    return tuple(float(rng.uniform(*each)) for each in search.bounds(MODEL))


@given(seed=seeds, percent=st.integers(20, 100), depths=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=40)
def test_every_point_fills_the_budget(seed, percent, depths):
    """In the exact space less than a rank of each linear is left; of a linear just below dense,
    that is the step to the dense weight, less than two ranks."""
    search = SearchAllocator(depths=depths)
    plan = search.plan(MODEL, CURVES, Budget(percent / 100), drawn(search, seed))
    left = Budget(percent / 100).total(MODEL) - plan.stored_values
    cut = [each for each in MODEL if plan.assignments[each.name].form != "dense"]
    assert 0 <= left <= sum(2 * each.rank_cost for each in cut)
    ends = [each.values // each.rank_cost - 1 for each in cut]
    if all(plan.assignments[e.name].rank < end for e, end in zip(cut, ends, strict=True)):
        assert left < sum(each.rank_cost for each in cut) + 1


@given(seed=seeds, percent=st.integers(35, 100))
@settings(deadline=None, max_examples=40)
def test_a_sample_of_the_window_lies_in_the_window(seed, percent):
    """It stores between the budget and 0.1 of the dense values less, up to rounding to ranks, and
    has the published ranks floor(ρ m n / (m + n)) where its own fractions are in the window."""
    search, kept = SearchAllocator(space="window"), percent / 100
    point = drawn(search, seed)
    plan = search.plan(MODEL, CURVES, Budget(kept), point)
    rounding = sum(2 * each.rank_cost for each in MODEL)
    assert (kept - 0.1) * DENSE - rounding <= plan.stored_values <= kept * DENSE + 1e-6
    fraction = {}
    for z, places in zip(point, search.groups(MODEL).values(), strict=True):
        fraction |= {MODEL[place].name: math.exp(z) for place in places}
    own = sum(fraction[each.name] * each.values for each in MODEL) / DENSE
    if kept - 0.1 < own < kept:
        for each in MODEL:
            published = math.floor(fraction[each.name] * each.values / each.rank_cost + 1e-9)
            # one value less of the whole model may be a rank less of a linear
            assert published - plan.assignments[each.name].rank in (0, 1)


def test_weights_divide_the_budget():
    """Unclipped fractions of two groups are as e to the difference of their coordinates."""
    search = SearchAllocator(low=0.01)
    model = make_model({"self_attn.o_proj": (4096, 4096), "mlp.up_proj": (8192, 4096)}, blocks=2)
    plan = search.plan(model, {}, Budget(0.3), (0.7,))
    kept = search.kept(model, plan)
    ratio = kept["mlp.up_proj"] / kept["self_attn.o_proj"]
    assert ratio == pytest.approx(math.exp(0.7), rel=2e-3)


def test_equal_coordinates_are_the_uniform_plan():
    """The center of both spaces has the ranks of `Uniform`, floor(keep m n / (m + n))."""
    uniform = Uniform()(MODEL, {}, Budget(0.6), {})
    for space in ("exact", "window"):
        search = SearchAllocator(space=space)
        plan = search.plan(MODEL, {}, Budget(0.6), search.even(MODEL, Budget(0.6)))
        assert plan.assignments == uniform.assignments


def test_equal_coordinates_around_the_curves_are_the_plan_of_the_curves():
    """Every linear gets the share that `Threshold` gives it, so the same rank."""
    search, budget = SearchAllocator(around="threshold", low=0.01), Budget(0.6)
    closed = Threshold()(MODEL, CURVES, budget, {})
    assert search(MODEL, CURVES, budget, {}).assignments == closed.assignments


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_a_plan_is_found_at_its_point(seed):
    """The point that is located for a plan of the space gives it again, within a rank."""
    for search in (SearchAllocator(depths=2), SearchAllocator(space="window")):
        plan = search.plan(MODEL, CURVES, Budget(0.6), drawn(search, seed))
        again = search.plan(MODEL, CURVES, Budget(0.6), search.locate(MODEL, plan))
        for each in MODEL:
            sizes = [p.assignments[each.name].stored_values(each) for p in (plan, again)]
            assert abs(sizes[0] - sizes[1]) <= 3 * each.rank_cost


def test_groups_are_types_in_parts_of_the_model():
    """q and k are one type; experts are one type whatever their number; parts are consecutive."""
    types = ["self_attn.qk_proj", "self_attn.v_proj", "self_attn.o_proj"]
    types += ["mlp.up_proj", "mlp.down_proj"]
    assert [*SearchAllocator().groups(MODEL)] == types
    parts = SearchAllocator(depths=2).groups(MODEL)
    assert [*parts] == [f"{name}, part {part}" for part in (1, 2) for name in types]
    for name, places in parts.items():
        assert {MODEL[each].block // 2 + 1 for each in places} == {int(name[-1])}
    assert len(SearchAllocator(depths=2).bounds(MODEL)) == 2 * 5 - 1
    assert len(SearchAllocator(depths=2, space="window").bounds(MODEL)) == 2 * 5
    _, experts = make_experts(2, 3)
    assert {type_of(each) for each in experts} == {
        f"mlp.experts.{p}" for p in ("gate", "up", "down")
    }


def test_one_group_leaves_nothing_to_choose():
    """Its fraction is that of the budget: the exact space has no coordinate."""
    model = make_model({"mlp.up_proj": (96, 48)}, blocks=3)
    assert SearchAllocator().bounds(model) == ()
    assert (
        SearchAllocator()(model, {}, Budget(0.5), {}).assignments["blocks.0.mlp.up_proj"].rank == 16
    )


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_multiples_leave_less_than_one_of_them(seed):
    """Ranks are multiples, and what is left is too little for the next one of any linear."""
    search = SearchAllocator()
    budget = Budget(0.6, multiple=4)
    plan = search.plan(MODEL, CURVES, budget, drawn(search, seed))
    for each in MODEL:
        rank = plan.assignments[each.name].rank
        assert rank % 4 == 0
        if plan.assignments[each.name].form != "dense":
            following = min((rank + 4) * each.rank_cost, each.values) - rank * each.rank_cost
            assert plan.slack_values < following


def test_a_budget_below_the_smallest_plan_is_infeasible():
    """The message has both numbers; every share holds rank 1, also where `low` does not."""
    with pytest.raises(InfeasibleError, match=r"keep: 0\.19 allows 11673 .* 0\.2 of every linear"):
        SearchAllocator().check_budget(MODEL, Budget(0.19))
    SearchAllocator().check_budget(MODEL, Budget(0.2))
    small = make_model({"q_proj": (64, 64), "w": (4, 6)}, blocks=1)
    plan = SearchAllocator()(small, {}, Budget(0.3), {})
    assert plan.assignments["blocks.0.w"].rank == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0}, "search: low is 0"),
        ({"spread": -1}, "search: spread is -1"),
        ({"trials": 2}, "search: trials is 2"),
        ({"sampler": "grid"}, "gp, random, tpe"),
        ({"space": "window", "around": "threshold"}, "leave around or space out"),
        ({"text": 3}, "search: text is 3"),
    ],
)
def test_an_option_that_is_not_allowed_is_refused(options, message):
    """The message has the option, its value and the remedy."""
    with pytest.raises(UsageError, match=message):
        SearchAllocator(**options)


def test_all_trials_are_forecast():
    """Every plan passes every sequence through the whole model, whatever its linears."""
    assert SearchAllocator(trials=20, sequences=6).scoring_passes(28) == 120
    assert SearchAllocator(trials=20, sequences=6, divergence=0.1).scoring_passes(28) == 126
    assert replace(SearchAllocator(), batch=3).scoring_passes(1) == 50 * 32
