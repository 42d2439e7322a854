"""One threshold that drops experts, cuts them or leaves them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from allocation import make_curves, make_experts, make_linears
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget, plan_cost
from orchestrator.allocate.experts.drops import predicted_loss
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.cost import OPERATIONS, VALUES
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve

DROPPING, PLAIN = Threshold(drop="zero"), Threshold()


def make_case(seed, *, blocks, count, choices, width=6, scale=1.0):
    """Make experts and two other linears, with curves of which `down`'s are scaled."""
    modules, linears = make_experts(blocks, count, choices=choices, hidden=width, inner=width)
    linears += make_linears([(width, width), (2 * width, width)])
    curves = make_curves(linears, seed)
    for name, curve in curves.items():
        if name.endswith("down"):
            total, energies = scale * curve.total, scale * curve.energies
            curves[name] = replace(curve, total=total, energies=energies)
    return modules, linears, curves


def dropped_of(plan, module):
    """Return the numbers of the dropped experts of a module; each is dropped as a whole."""
    found = []
    for number in range(module.count):
        gone = {plan.assignments[name].form == "dropped" for name in module.expert(number)}
        assert len(gone) == 1
        found += [number] * gone.pop()
    return found


@given(seed=st.integers(0, 200), keep=st.floats(0.15, 0.95), scale=st.sampled_from([1e-4, 1, 1e4]))
def test_laws(seed, keep, scale):
    """Within the budget; never a larger loss than without dropping; experts go as a whole, and as
    many stay as the router chooses."""
    modules, linears, curves = make_case(seed, blocks=2, count=4, choices=2, scale=scale)
    budget = Budget(round(keep, 3), LOW_RANK, experts=modules)
    try:
        plan = DROPPING(linears, curves, budget, {})
    except InfeasibleError:
        assert budget.share(linears) < 18 * 12 * 2 * 0.5 + 12 + 18
        return
    assert plan.stored_values <= plan.budget_values == budget.share(linears)
    for module in modules:
        assert len(dropped_of(plan, module)) <= module.count - module.chosen
    try:
        plain = PLAIN(linears, curves, budget, {})
    except InfeasibleError:
        return
    found, whole = (predicted_loss(linears, curves, each) for each in (plan, plain))
    assert found <= whole
    if not any(dropped_of(plan, module) for module in modules):
        assert plan == plain


@given(seed=st.integers(0, 50))
def test_an_expert_without_loss_goes_and_one_of_all_loss_stays(seed):
    """At half of the values: the one is the first to go, the other is never dropped."""
    modules, linears, curves = make_case(seed, blocks=1, count=4, choices=1)
    (module,) = modules
    for number, scale in ((1, 0.0), (3, 1e9)):
        for name in module.expert(number):
            curve = curves[name]
            total, energies = scale * curve.total, scale * curve.energies
            curves[name] = replace(curve, total=total, energies=energies)
    plan = DROPPING(linears, curves, Budget(0.5, LOW_RANK, experts=modules), {})
    assert 1 in dropped_of(plan, module)
    assert 3 not in dropped_of(plan, module)


def every_size(linear):
    cut = [Assignment(form="low_rank", rank=r) for r in range(1, LOW_RANK.break_even(linear))]
    return [*cut, Assignment(form="dense")]


@pytest.mark.parametrize("seed", range(6))
def test_two_experts_are_best_at_every_corner(seed):
    """At every corner of the lower convex hull of all 784 plans, the plan has the least loss."""
    modules, linears = make_experts(1, 2, choices=0, hidden=6, inner=6)
    curves = make_curves(linears, seed)
    gone = [Assignment(form="dropped")] * 3
    of_expert = [*itertools.product(*map(every_size, linears[:3])), gone]
    points = {}
    for picked in itertools.product(of_expert, repeat=2):
        pairs = zip(linears, itertools.chain(*picked), strict=True)
        assignments = {linear.name: each for linear, each in pairs}
        stored = sum(assignments[each.name].stored_values(each) for each in linears)
        plan = Plan(assignments=assignments, budget_values=stored, stored_values=stored)
        loss = predicted_loss(linears, curves, plan)
        points[stored] = min(points.get(stored, np.inf), loss)
    corners = lower_hull(sorted(points.items()))
    assert len(corners) > 3
    for values, loss in corners[1:]:
        keep = values / sum(each.values for each in linears)
        budget = Budget(min(round(keep + 1e-9, 9), 1.0), LOW_RANK, experts=modules)
        assert budget.share(linears) == values
        found = DROPPING(linears, curves, budget, {})
        assert predicted_loss(linears, curves, found) == pytest.approx(loss, rel=1e-9, abs=1e-9)


def lower_hull(points):
    """Return the corners of the lower convex hull, from the left, of points by ascending x."""
    hull = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (
            y - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull


@pytest.mark.parametrize("in_bytes", [False, True])
def test_other_limits_are_met(in_bytes):
    """A budget of multiply-adds or of bytes is met by a plan that drops experts."""
    modules, linears, curves = make_case(3, blocks=1, count=4, choices=1)
    cost = VALUES if in_bytes else OPERATIONS
    budget = Budget(0.4, LOW_RANK, in_bytes=in_bytes, cost=cost, experts=modules)

    def divide(given):
        return DROPPING(linears, curves, given, {})

    options = {"divides_costs": DROPPING.divides_costs}
    plan = fill_budget(divide, linears, budget, CODECS["bfloat16"], **options)
    assert dropped_of(plan, modules[0])
    assert plan_cost(linears, plan.assignments, cost) <= budget.share(linears)


def test_settings_that_exclude_each_other():
    """A floor or the published rule has no hull to drop from; without experts nothing drops."""
    for options in ({"floor": 0.5}, {"dense": "break_even"}):
        with pytest.raises(UsageError, match="leave out floor and dense"):
            Threshold(drop="zero", **options)
    linears = make_linears([(6, 6)])
    with pytest.raises(UsageError, match="no linear of any is targeted"):
        DROPPING(linears, make_curves(linears), Budget(0.8), {})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "expert-sharing", "keep": 0.5}, "gives the experts of a block one basis"),
        ({"method": "two-sided", "keep_flops": 0.5}, "a token that is routed again takes as many"),
        ({"method": "reap", "keep_flops": 0.5}, "reap keeps experts, and a token takes as many"),
        ({"method": "reap", "keep": 0.5, "storage": "pivoted"}, "reap keeps the form dropped"),
    ],
)
def test_drops_that_are_no_result_or_save_nothing(fields, says):
    """One line says why, before a file is read."""
    options = {"threshold": {"drop": "reroute"}} if fields["method"] != "reap" else {}
    with pytest.raises(UsageError, match=says):
        resolve(Recipe(model="m", out="o", options=options, **fields))
