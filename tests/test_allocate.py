"""The battery that every allocator passes, and the claims of each."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate import ALLOCATORS
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan import Curve, Linear, Plan

SHAPES = st.tuples(st.integers(2, 60), st.integers(2, 60))


def make_linears(shapes):
    return [
        Linear(
            name=f"blocks.{n}.proj",
            block=n,
            role="proj",
            site=f"blocks.{n}.proj",
            out_features=out,
            in_features=inputs,
            has_bias=False,
        )
        for n, (out, inputs) in enumerate(shapes)
    ]


def make_curves(linears, seed=0):
    rng = np.random.default_rng(seed)
    curves = {}
    for linear in linears:
        energies = np.sort(rng.exponential(size=min(linear.out_features, linear.in_features)))[::-1]
        curves[linear.name] = Curve(
            name=linear.name, energies=energies, total=float(energies.sum())
        )
    return curves


def assert_invariants(plan, linears, keep):
    """The laws in the docstring of `orchestrator.allocate`."""
    dense = sum(linear.values for linear in linears)
    stored = sum(plan.assignments[linear.name].stored_values(linear) for linear in linears)
    assert stored == plan.stored_values
    assert stored <= plan.budget_values <= keep * dense + 1e-9 * dense
    assert plan.assignments.keys() == {linear.name for linear in linears}
    for linear in linears:
        assignment = plan.assignments[linear.name]
        if assignment.form == "low_rank":
            assert 1 <= assignment.rank < linear.break_even


@pytest.mark.parametrize("name", ALLOCATORS)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=6), percent=st.integers(1, 100))
@settings(deadline=None, max_examples=100)
def test_allocators_keep_the_laws(name, shapes, percent):
    """The budget is met from below, ranks stay below break-even, or the budget is infeasible."""
    linears, keep = make_linears(shapes), percent / 100
    try:
        plan = ALLOCATORS[name](linears, make_curves(linears), keep)
    except InfeasibleError:
        return
    assert_invariants(plan, linears, keep)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", ALLOCATORS)
def test_more_budget_never_stores_less(name):
    """Stored values grow with the budget, and everything is dense at 1."""
    linears = make_linears([(64, 64), (16, 64), (96, 64), (64, 96)])
    curves = make_curves(linears)
    stored = [ALLOCATORS[name](linears, curves, k / 50).stored_values for k in range(10, 51)]
    assert stored == sorted(stored)
    assert stored[-1] == sum(linear.values for linear in linears)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, math.nan])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_kept_fraction_outside_its_range_is_refused(name, keep):
    """Only (0, 1] is a kept fraction."""
    linears = make_linears([(8, 8)])
    with pytest.raises(UsageError, match="keep"):
        ALLOCATORS[name](linears, make_curves(linears), keep)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_less_than_rank_one_everywhere_is_infeasible(name):
    """The error says what is needed and what the least possible is."""
    linears = make_linears([(64, 64)])
    with pytest.raises(InfeasibleError, match=r"128.*0\.03125"):
        ALLOCATORS[name](linears, make_curves(linears), 0.03)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((4096, 4096), 1638), ((4096, 11008), 2388), ((1024, 4096), 655), ((576, 1536), 335)],
)
def test_uniform_gives_the_published_ranks(shape, rank):
    """At 0.8 kept the rank is floor(0.8 m n / (m + n)), as the papers print it."""
    (linear,) = make_linears([shape])
    assert ALLOCATORS["uniform"]([linear], {}, 0.8).assignments[linear.name].rank == rank


def test_losses_of_a_curve_are_its_cut_tail():
    """Loss at rank r is what is left of the total, never below zero."""
    curve = Curve(name="a", energies=np.array([4.0, 2.0, 1.0]), total=7.5)
    assert [curve.loss(rank) for rank in range(4)] == [7.5, 3.5, 1.5, 0.5]
    assert Curve.from_json(curve.to_json()).loss(2) == 1.5
