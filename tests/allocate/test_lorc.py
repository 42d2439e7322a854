"""Budgets of a cache, and LoRC's ranks by cumulative condition numbers."""

import math

import numpy as np
import pytest
from allocation import every_plan, lost, make_curve, make_curves, make_model

from orchestrator.allocate.budget import Budget, plan_cost
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.lorc import Lorc, depths
from orchestrator.allocate.steps import step_costs
from orchestrator.allocate.threshold import Threshold
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError, InputError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.cost import CACHE
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.plan import Assignment

KEYS_VALUES = {"self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
MODEL = make_model(KEYS_VALUES, blocks=5)


def curves_of(conditions, width=32):
    """Return curves of weights of which both in a block have this condition number."""
    return {
        each.name: make_curve(each.name, np.geomspace(1, conditions[each.block], width) ** -2.0)
        for each in MODEL
    }


def ranks_of(plan):
    """Return the ranks of the keys, in order of the blocks; those of the values are equal."""
    found = [plan.assignments[each.name] for each in MODEL]
    sizes = [32 if each.form == "dense" else each.rank for each in found]
    assert sizes[::2] == sizes[1::2]
    return sizes[::2]


def test_a_cache_stores_outputs_or_latents_of_keys_and_values():
    """R of low rank, plain or pivoted, and all outputs of a sparse or a dense one; nothing of
    other linears, which stay dense at any budget, also by allocators that divide values."""
    others = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}
    model = make_model({**KEYS_VALUES, **others}, blocks=2)
    key, query = model[0], model[2]
    cuts = {
        Assignment(form="dense"): 32,
        Assignment(form="low_rank", rank=7): 7,
        Assignment(form="low_rank", rank=7, basis="other"): 7,
        Assignment(form="pivoted", rank=7): 7,
        Assignment(form="sparse", nonzeros=9): 32,
        Assignment(form="low_rank_sparse", rank=7, nonzeros=9): 32,
    }
    assert {cut: CACHE.of(key, cut) for cut in cuts} == cuts
    assert {CACHE.of(query, cut) for cut in cuts} == {0}
    budget, curves = Budget(0.4, cost=CACHE), make_curves(model)
    for allocator in (Threshold(), Lorc(), Uniform()):
        plan = fill_budget(
            lambda each, divide=allocator: divide(model, curves, each, {}),
            *(model, budget, CODECS["bfloat16"]),
            divides_costs=allocator.divides_costs,
        )
        forms = {each.name: plan.assignments[each.name].form for each in model}
        assert {name for name, form in forms.items() if form == "dense"} >= {
            each.name for each in model if not each.is_cached
        }
        spent = plan_cost(model, plan.assignments, CACHE)
        # uniform ranks are all one larger at the next size; by depth the next one is dense
        assert (42 if isinstance(allocator, Lorc) else 48) <= spent <= 0.4 * 128


def test_no_plan_with_as_small_a_cache_loses_less():
    """At every corner of the hulls of `threshold`, compared with all plans."""
    tiny = make_model({"k_proj": (8, 12), "v_proj": (8, 12)}, blocks=2)
    curves = make_curves(tiny)
    others = [
        (plan_cost(tiny, cuts, CACHE), sum(lost(cuts[e.name], curves[e.name]) for e in tiny))
        for cuts in every_plan(tiny, sum(each.values for each in tiny))
    ]
    allowed = AllowedRanks(cost=CACHE)
    keys = np.concatenate([Threshold().keys(each, curves[each.name], allowed) for each in tiny])
    costs = np.concatenate([step_costs(each, allowed) for each in tiny])
    first = max(Threshold().keys(each, curves[each.name], allowed)[0] for each in tiny)
    levels = np.unique(keys[keys >= first])
    assert len(levels) > 3
    for level in levels:
        corner = int(costs[keys <= level].sum())
        plan = Threshold()(tiny, curves, Budget(min((corner + 0.5) / 32, 1), cost=CACHE), {})
        assert plan_cost(tiny, plan.assignments, CACHE) == corner
        found = sum(lost(plan.assignments[each.name], curves[each.name]) for each in tiny)
        assert found == pytest.approx(min(loss for size, loss in others if size <= corner))


def test_cumulative_condition_numbers_are_products_of_those_behind():
    """t_l by the definition, ascending with depth; σ_min is at least 1e-4 of σ_max."""
    conditions = [3.0, 1.0, 50.0, 1e9, 2.0]
    found = depths(MODEL, curves_of(conditions))
    clipped = [min(each, 1e4) for each in conditions]
    logs = [math.log(math.prod(each**2 for each in clipped[block:])) for block in range(5)]
    expected = [(logs[0] - each) / (logs[0] - logs[-1]) for each in logs]
    assert [found[block] for block in range(5)] == pytest.approx(expected, abs=1e-12)
    assert found[0] == 0
    assert found[4] == 1
    # a condition number of 1 changes no product
    assert found[1] == pytest.approx(found[2], abs=1e-12)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.6, 0.75])
def test_ranks_are_those_of_the_formula(kept):
    """d_l = floor(d_max (1 - t_l (1 - d_min / d_max))) for some d_min, non-increasing with depth,
    equal where κ̃ is; d_max is the width while d_min can pay for it, and 1 is the least."""
    curves = curves_of([3.0, 1.0, 50.0, 10.0, 2.0])
    found = ranks_of(Lorc()(MODEL, curves, Budget(kept, cost=CACHE), {}))
    assert sorted(found, reverse=True) == found
    assert found[1] == found[2]
    assert sum(found) * 2 <= kept * 320
    most = 32 * 64 // 96 - 1  # below break-even
    depth = depths(MODEL, curves)

    def by_hand(first, last):
        sizes = [first * (1 - depth[block]) + last * depth[block] for block in range(5)]
        return [32 if each >= 32 else min(max(int(each + 1e-9), 1), most) for each in sizes]

    grid = [(32, last) for last in np.linspace(0, 32, 2001)]
    grid += [(first, 0) for first in np.linspace(0, 32, 2001)]
    plans = [by_hand(first, last) for first, last in grid]
    assert found in plans
    assert sum(found) == max(sum(each) for each in plans if 2 * sum(each) <= kept * 320)
    assert (found[0] == 32) == (kept >= 0.6)  # a smaller one does not hold [32, 20, 20, 10, 1]


def test_equal_condition_numbers_give_equal_ranks():
    """Orthogonal weights have κ̃ = 1 in every block: one rank for all. Equal κ above 1 have ranks
    that fall by equal steps."""
    even = ranks_of(Lorc()(MODEL, curves_of([1.0] * 5), Budget(0.5, cost=CACHE), {}))
    assert even == [16] * 5
    found = ranks_of(Lorc(largest=0.5)(MODEL, curves_of([7.0] * 5), Budget(0.375, cost=CACHE), {}))
    assert found == [16, 14, 12, 10, 8]
    in_values = Lorc()(MODEL, curves_of([7.0] * 5), Budget(0.6), {})
    assert ranks_of(in_values) == sorted(ranks_of(in_values), reverse=True)
    multiples = Lorc()(MODEL, curves_of([7.0] * 5), Budget(0.5, cost=CACHE, multiple=4), {})
    assert {each % 4 for each in ranks_of(multiples)} == {0}


def test_a_singular_value_that_is_not_a_number_is_named():
    """With the linear; a smallest value of zero is one, and a weight of zeros has κ = 1."""
    curves = curves_of([3.0] * 5)
    name = MODEL[4].name
    curves[name] = make_curve(name, np.append(curves[name].energies[:-1], 0.0))
    assert depths(MODEL, curves)[3] > depths(MODEL, curves_of([3.0] * 5))[3]
    curves[name] = make_curve(name, np.zeros(32))
    assert depths(MODEL, curves)[2] == pytest.approx(depths(MODEL, curves)[3] * 3 / 5, rel=1)
    curves[name] = make_curve(name, np.append(curves[name].energies[:-1], np.nan))
    with pytest.raises(InputError, match=rf"{name}: a singular value is not a number"):
        Lorc()(MODEL, curves, Budget(0.5), {})
    with pytest.raises(InfeasibleError, match=r"keep_cache: 0\.02 allows 6 cached numbers a token"):
        Lorc()(MODEL, curves, Budget(0.02, LOW_RANK, cost=CACHE), {})
