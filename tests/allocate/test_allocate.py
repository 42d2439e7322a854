"""Laws of all allocators, with the laws that each of them keeps."""

import math
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
from allocation import (
    RANK_ALLOCATORS,
    assert_invariants,
    lost,
    make_cosines,
    make_curves,
    make_linears,
    make_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.d_rank import DRankAllocator
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.gates.learned import Learned
from orchestrator.allocate.gates.soco import Soco
from orchestrator.allocate.gates.threshold_path import ThresholdPath
from orchestrator.allocate.grasp import GraspAllocator
from orchestrator.allocate.lorc import Lorc
from orchestrator.allocate.mgaa import RULES, MgaaAllocator
from orchestrator.allocate.search import SearchAllocator
from orchestrator.allocate.steps import spend, step_costs
from orchestrator.allocate.strs import Strs
from orchestrator.allocate.svd_llm_v2 import SvdLlmV2Allocator
from orchestrator.allocate.threshold import Threshold
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import LOW_RANK, SPARSE
from orchestrator.plan.plan import Plan

GROWS = "no rank, and so no stored total, falls as the budget grows, and no loss rises"
DENSE = "everything is dense at 1"
TYPES = "linears of one type may exchange their curves"
WHOLE = "a curve cut at break-even gives the same plan"

CASES = {
    "uniform": (Uniform(), {GROWS, DENSE, TYPES, WHOLE}),
    # its scores depend on the uniform rank, which changes with the budget
    "svd-llm-v2": (SvdLlmV2Allocator(), {DENSE, TYPES, WHOLE}),
    # an effective rank needs the whole spectrum
    "d-rank": (DRankAllocator(), {GROWS, DENSE, TYPES}),
    "d-rank beta": (DRankAllocator(beta=0.3), {GROWS, DENSE, TYPES}),
    "d-rank model": (DRankAllocator(scope="model"), {GROWS, DENSE, TYPES}),
    "d-rank model beta": (DRankAllocator(scope="model", beta=0.3), {GROWS, DENSE, TYPES}),
    # a type that changes to or from uniform may lose ranks
    "d-rank code": (DRankAllocator(accept="code", beta=0.2), {DENSE, TYPES}),
    # rounding may exceed the budget, and ranks above break-even are not reassigned
    "d-rank paper": (DRankAllocator(setting="paper"), {TYPES}),
    "d-rank paper beta": (DRankAllocator(setting="paper", beta=0.3), {TYPES}),
    "d-rank paper model": (DRankAllocator(setting="paper", scope="model", beta=0.3), {TYPES}),
    "d-rank paper code": (DRankAllocator(setting="paper", accept="code"), {TYPES}),
    # the total of a curve matters: the gain of the dense weight beyond break-even
    "threshold": (Threshold(), {GROWS, DENSE, TYPES, WHOLE}),
    "threshold break-even": (Threshold(dense="break_even"), {GROWS, DENSE, TYPES, WHOLE}),
    # a floor grows with the budget, the remainder need not
    "threshold floor": (Threshold(floor=0.5), {DENSE, TYPES, WHOLE}),
    # curves of the same sublayer interact
    "mgaa bounds": (MgaaAllocator(leftover="slack"), {GROWS, WHOLE}),
    # the largest remainder changes with the budget
    "mgaa": (MgaaAllocator(low=0.2, high=1), {DENSE, WHOLE}),
    **{
        f"mgaa {rule}": (
            MgaaAllocator(rule=rule, low=0.2, high=1, leftover="slack"),
            {GROWS, DENSE, WHOLE},
        )
        for rule in RULES
    },
    # condition numbers are those of whole spectra, and add up over the blocks behind
    "lorc": (Lorc(), {GROWS, DENSE}),
    "lorc largest": (Lorc(largest=0.5), {GROWS}),
    # a larger budget cuts fewer blocks, whose linears may keep less
    "grasp": (GraspAllocator(), {DENSE, WHOLE}),
    "grasp least": (GraspAllocator(least=0.8), {DENSE, WHOLE}),
    "grasp importance": (GraspAllocator(cut="importance"), {DENSE, WHOLE}),
    # without losses: the plan of equal coordinates
    "search": (SearchAllocator(), {GROWS, DENSE, TYPES, WHOLE}),
    "search window": (SearchAllocator(space="window"), {GROWS, DENSE, TYPES, WHOLE}),
    # scores are exchanged with their curves
    "learned": (Learned(below_stop="allow"), {GROWS, DENSE, TYPES, WHOLE}),
    "path": (ThresholdPath(below_stop="allow"), {GROWS, DENSE, TYPES, WHOLE}),
    "soco": (Soco(below_target="allow"), {GROWS, DENSE, TYPES, WHOLE}),
    # sensitivities are exchanged with their curves
    "strs": (Strs(grid="0.2 0.4 0.6 0.8 0.9"), {GROWS, DENSE, TYPES, WHOLE}),
}

BF16 = CODECS["bfloat16"]
ROLES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
SHAPES = st.tuples(st.integers(2, 40), st.integers(2, 40))
MODELS = st.builds(
    make_model,
    st.tuples(*[SHAPES] * len(ROLES)).map(lambda shapes: dict(zip(ROLES, shapes, strict=True))),
    st.integers(1, 3),
)
SMALL = make_model(
    dict(zip(ROLES, [(48, 48), (16, 48), (16, 48), (96, 48), (48, 96)], strict=True)), blocks=4
)

every_case = pytest.mark.parametrize("case", CASES)


def with_law(law):
    return pytest.mark.parametrize(
        "case", [case for case, (_, laws) in CASES.items() if law in laws]
    )


def run(case, linears, keep, curves=None, cosines=None):
    curves = curves or make_curves(linears)
    return CASES[case][0](linears, curves, Budget(keep), cosines=cosines or make_cosines(linears))


def fill(linears, allocator, curves, budget):
    cosines = make_cosines(linears)
    return fill_budget(
        lambda each: allocator(linears, curves, each, cosines), linears, budget, BF16
    )


def test_the_battery_covers_every_allocator():
    """Each name in the table is a frozen class with a case above."""
    assert {type(allocator) for allocator, _ in CASES.values()} == set(RANK_ALLOCATORS.values())
    for allocator in RANK_ALLOCATORS.values():
        slots = {name for each in allocator.__mro__ for name in vars(each).get("__slots__", ())}
        assert slots == {field.name for field in fields(allocator)}
        assert allocator() == allocator()
        assert hash(allocator()) == hash(allocator())


@every_case
@given(linears=MODELS, percent=st.integers(1, 100), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_allocators_keep_the_laws(case, linears, percent, seed):
    """The budget is met from below and ranks stay below break-even, or the budget is infeasible."""
    try:
        plan = run(case, linears, percent / 100, make_curves(linears, seed))
    except InfeasibleError:
        return
    assert_invariants(plan, linears, percent / 100)
    assert Plan.from_json(plan.to_json()) == plan


@with_law(GROWS)
def test_more_budget_never_means_less(case):
    """Each linear's rank, the stored total and minus the loss grow with the budget."""
    curves = make_curves(SMALL)
    before = None
    for percent in range(32, 98):
        plan = run(case, SMALL, percent / 100, curves)
        sizes = np.array([plan.assignments[each.name].stored_values(each) for each in SMALL])
        loss = sum(lost(plan.assignments[each.name], curves[each.name]) for each in SMALL)
        if before is not None:
            assert np.all(sizes >= before[0])
            assert loss <= before[1]
        before = sizes, loss


@with_law(DENSE)
def test_everything_is_dense_at_one(case):
    """A budget of all values is spent completely."""
    plan = run(case, SMALL, 1.0)
    assert {assignment.form for assignment in plan.assignments.values()} == {"dense"}
    assert plan.slack_values == 0


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("lorc")])
def test_blocks_may_be_exchanged(case):
    """Exchanging curves and cosines of two blocks exchanges their assignments."""
    curves, cosines = make_curves(SMALL), make_cosines(SMALL)
    plan = run(case, SMALL, 0.7, curves, cosines)

    def at_other(block):
        return (block + 1) % 4

    other = {each.name: f"blocks.{at_other(each.block)}.{each.role}" for each in SMALL}
    moved = {name: replace(curves[other[name]], name=name) for name in other}
    parts = {name: name.partition(".") for name in cosines}
    turned = {
        name: cosines[f"{at_other(int(block))}{dot}{part}"]
        for name, (block, dot, part) in parts.items()
    }
    after = run(case, SMALL, 0.7, moved, turned)
    assert after.assignments == {name: plan.assignments[other[name]] for name in other}


@with_law(TYPES)
def test_linears_of_one_type_may_be_exchanged(case):
    """Exchanging curves of two linears of one type exchanges their assignments."""
    curves = make_curves(SMALL)
    plan = run(case, SMALL, 0.7, curves)
    for role in ROLES:
        one, two = f"blocks.0.{role}", f"blocks.2.{role}"
        swapped = curves | {
            one: replace(curves[two], name=one),
            two: replace(curves[one], name=two),
        }
        after = run(case, SMALL, 0.7, swapped).assignments
        expected = plan.assignments | {one: plan.assignments[two], two: plan.assignments[one]}
        assert after == expected


@with_law(WHOLE)
def test_a_curve_may_be_cut_at_break_even(case):
    """Energies beyond break-even matter only through the total."""
    curves = make_curves(SMALL)
    cut = {
        each.name: replace(
            curves[each.name], energies=curves[each.name].energies[: LOW_RANK.break_even(each)]
        )
        for each in SMALL
    }
    assert run(case, SMALL, 0.6, cut) == run(case, SMALL, 0.6, curves)


@every_case
def test_linears_that_cost_as_much_as_their_factors_stay_dense(case):
    """If rank 1 reaches break-even, only the dense weight can be chosen."""
    linears = make_model(dict.fromkeys(ROLES, (2, 2)), blocks=2)
    with pytest.raises(InfeasibleError):
        run(case, linears, 0.95)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan])
@every_case
def test_a_kept_fraction_outside_its_range_is_refused(case, keep):
    """Kept fractions outside (0, 1] are refused."""
    with pytest.raises(UsageError, match="keep"):
        run(case, SMALL, keep)


@every_case
def test_less_than_rank_one_everywhere_is_infeasible(case):
    """The message has the required minimum and the smallest possible fraction."""
    linears = make_model(dict.fromkeys(ROLES, (64, 64)), blocks=1)
    with pytest.raises(InfeasibleError, match=r"640.*0\.03125"):
        run(case, linears, 0.03)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((4096, 4096), 1638), ((4096, 11008), 2388), ((1024, 4096), 655), ((576, 1536), 335)],
)
def test_uniform_gives_the_published_ranks(shape, rank):
    """At keep 0.8 the rank is floor(0.8 m n / (m + n)), as printed in the papers."""
    (linear,) = make_linears([shape])
    plan = Uniform()([linear], {}, Budget(0.8), cosines={})
    assert plan.assignments[linear.name].rank == rank


@given(shape=SHAPES)
def test_steps_lead_to_the_dense_weight(shape):
    """All steps together cost the dense weight, the last one less than two ranks."""
    (linear,) = make_linears([shape])
    costs = step_costs(linear)
    assert costs.sum() == linear.values
    assert len(costs) == max(LOW_RANK.break_even(linear), 1)
    if len(costs) > 1:
        assert set(costs[:-1]) <= {linear.rank_cost}
        assert linear.rank_cost <= costs[-1] < 2 * linear.rank_cost


def test_steps_are_taken_in_order_and_none_out_of_turn():
    """The first step that does not fit ends the selection, even if a later one is cheaper."""
    wide, narrow = make_linears([(40, 40), (8, 8)])
    keys = [np.arange(20.0), np.arange(4.0) + 0.5]
    # both first ranks, 80 + 16; then 80 at key 1, 16 at 1.5, and 80 at 2 does not fit in 79
    plan = spend([wide, narrow], keys, 80 + 16 + 80 + 16 + 79, where="here")
    assert [plan[each.name].rank for each in (wide, narrow)] == [2, 2]
    with pytest.raises(InfeasibleError, match=r"here.*95.*96"):
        spend([wide, narrow], keys, 95, where="here")


def test_losses_of_a_curve_are_its_cut_tail():
    """The loss at rank r is the remainder of the total, never below zero."""
    curve = Curve(name="a", energies=np.array([4.0, 2.0, 1.0]), total=7.5)
    assert [curve.loss(rank) for rank in range(4)] == [7.5, 3.5, 1.5, 0.5]
    assert Curve.from_json(curve.to_json()).loss(2) == 1.5


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9, 1])
def test_bytes_of_factors_are_values(share):
    """Without indices, a budget in bytes gives the plan of the same fraction of values."""
    linears = make_model({"q": (24, 16), "up": (40, 16)}, 3)
    curves = make_curves(linears)
    divide = partial(DRankAllocator(), linears, curves, cosines={})
    budgets = [Budget(share, in_bytes=in_bytes) for in_bytes in (True, False)]
    plans = [fill_budget(lambda b: divide(budget=b), linears, each, BF16) for each in budgets]
    assert plans == [divide(budget=Budget(share))] * 2


@pytest.mark.parametrize("codec", [BF16, CODECS["float32"]])
@pytest.mark.parametrize("share", [0.2, 0.55, 0.8])
def test_bytes_of_indices_count(share, codec):
    """Values and indices of sparse linears fit from below, and 1e-5 more values do not fit."""
    linears = make_linears([(50, 40), (64, 64)])
    uniform = make_allocator("uniform", {}, "sparse")
    budget = Budget(share, SPARSE, in_bytes=True)
    plan = fill_budget(lambda each: uniform(linears, {}, each, {}), linears, budget, codec)

    def stored_bytes(plan):
        return sum(plan.assignments[x.name].stored_bytes(x, codec) for x in linears)

    dense = sum(linear.values for linear in linears)
    assert stored_bytes(plan) <= share * codec.bytes(dense)
    more = uniform(linears, {}, Budget((plan.budget_values + 2) / dense, SPARSE), {})
    assert more.stored_values > plan.stored_values
    assert stored_bytes(more) > share * codec.bytes(dense)


def test_bytes_that_hold_no_plan_are_infeasible():
    """Fewer bytes than rank 1 everywhere, or than one index, are refused with the reason."""
    linears = make_linears([(50, 40)])
    curves = make_curves(linears)
    with pytest.raises(InfeasibleError, match=r"keep: 0\.01 allows"):
        fill(linears, Uniform(), curves, Budget(0.01, in_bytes=True))
    sparse = make_allocator("uniform", {}, "sparse")
    with pytest.raises(InfeasibleError, match=r"keep_bytes: 0\.0005 .* indices included"):
        fill(linears, sparse, {}, Budget(0.0005, SPARSE, in_bytes=True))


def test_bytes_beyond_what_a_rule_may_keep_say_so():
    """MGAA keeps at most 0.98: a budget of all bytes fails with its message."""
    linears = make_model({"q": (24, 16)}, 3)
    with pytest.raises(InfeasibleError, match="raise its high"):
        fill(linears, MgaaAllocator(), make_curves(linears), Budget(1.0, in_bytes=True))
