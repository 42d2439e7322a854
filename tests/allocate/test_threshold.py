"""One threshold over the model: the least summed loss, compared with all plans."""

import numpy as np
import pytest
from allocation import every_plan, lost, make_curve, make_curves, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.steps import hull_rates
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import UsageError
from orchestrator.plan.forms import LOW_RANK

TINY = make_model({"mlp.up_proj": (9, 6), "mlp.down_proj": (5, 8)}, blocks=2)
DENSE_VALUES = sum(each.values for each in TINY)


def summed_loss(assignments, curves):
    return sum(lost(assignments[name], curve) for name, curve in curves.items())


@given(seed=st.integers(0, 200))
@settings(deadline=None, max_examples=25)
def test_no_plan_that_stores_as_little_loses_less(seed):
    """The plan is optimal at every budget that ends at a corner of a hull, compared with all
    plans."""
    curves = make_curves(TINY, seed)
    for percent in range(30, 100, 9):
        plan = Threshold()(TINY, curves, Budget(percent / 100), cosines={})
        # a plan is at a corner if no linear is inside a segment of its hull
        keys = [Threshold().keys(each, curves[each.name]) for each in TINY]
        sizes = [plan.assignments[each.name] for each in TINY]
        taken = [len(k) if a.form == "dense" else a.rank for k, a in zip(keys, sizes, strict=True)]
        if any(n < len(k) and k[n] == k[n - 1] for n, k in zip(taken, keys, strict=True)):
            continue
        best = min(summed_loss(each, curves) for each in every_plan(TINY, plan.stored_values))
        least = summed_loss(plan.assignments, curves)
        assert least == pytest.approx(
            best, rel=1e-9, abs=1e-12 * sum(c.total for c in curves.values())
        )


def test_components_stay_where_they_are_worth_the_threshold():
    """Away from break-even a component is kept if and only if its energy over m + n is large."""
    linears = make_model({"q": (60, 40), "up": (90, 40)}, blocks=3)
    curves = {
        each.name: make_curve(each.name, 10.0 ** (i / 3) * np.exp(-np.arange(40) / 4))
        for i, each in enumerate(linears)
    }
    plan = Threshold()(linears, curves, Budget(0.4), cosines={})
    rates = {True: [], False: []}
    for each in linears:
        rank = plan.assignments[each.name].rank
        assert 1 < rank < LOW_RANK.break_even(each) - 1
        rate = curves[each.name].energies / each.rank_cost
        rates[True].append(rate[:rank].min())
        rates[False].append(rate[rank:].max())
    assert min(rates[True]) >= max(rates[False])


def test_a_dense_weight_is_taken_early_where_that_gains_more():
    """For a flat spectrum ranks gain little: the hull jumps to the dense weight."""
    (linear,) = make_model({"q": (20, 20)}, blocks=1)
    curve = make_curve(linear.name, np.ones(20))
    # rank 9 of 10 loses 11 of 20 for 360 of 400 values; the dense weight costs 40 more
    assert len(set(Threshold().keys(linear, curve))) == 1
    keys = Threshold(dense="break_even").keys(linear, curve)
    np.testing.assert_allclose(keys, 40.0)


def test_a_floor_gives_every_linear_its_part_first():
    """A linear without energy gets the floor's share of its uniform rank, and no more."""
    linears = make_model({"q": (40, 40)}, blocks=2)
    strong = make_curve(linears[0].name, np.exp(-np.arange(40) / 10))
    weak = make_curve(linears[1].name, 1e-9 * np.exp(-np.arange(40) / 10))
    curves = {strong.name: strong, weak.name: weak}
    for floor, rank in ((0.0, 1), (0.5, 4)):
        # uniform at 0.5 is rank 10 of 20; the rest of the budget goes to the other
        plan = Threshold(floor=floor)(linears, curves, Budget(0.45), cosines={})
        assert plan.assignments[weak.name].rank == rank
        assert plan.assignments[strong.name].rank == 18 - rank


@pytest.mark.parametrize("options", [{"dense": "never"}, {"floor": 1.5}, {"floor": "half"}])
def test_values_that_are_not_allowed_are_refused(options):
    """The message has the name of the option."""
    with pytest.raises(UsageError, match=next(iter(options))):
        Threshold(**options)


@pytest.mark.parametrize("seed", range(40))
def test_hull_rates_are_those_of_the_hull(seed):
    """Each step's rate is that of the hull by definition: at every cost the maximum over chords
    between corners around it."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(1, 25))
    cost_K = np.full(steps, 7) if seed % 2 else 2 * np.arange(steps, 0, -1) + 1
    gain_K = np.sort(rng.random(steps) ** 4)[::-1].copy()
    gain_K[-1] = rng.random() * 2
    x = np.concatenate([[0], np.cumsum(cost_K)]).astype(float)
    y = np.concatenate([[0], np.cumsum(gain_K)])
    hull = [
        max(
            (y[a] * (x[b] - x[k]) + y[b] * (x[k] - x[a])) / (x[b] - x[a]) if b > a else y[k]
            for a in range(k + 1)
            for b in range(k, steps + 1)
        )
        for k in range(steps + 1)
    ]
    assert hull_rates(cost_K, gain_K) == pytest.approx(cost_K / np.diff(hull), rel=1e-9)
