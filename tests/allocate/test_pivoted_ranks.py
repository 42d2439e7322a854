"""Ranks of pivoted factors: what a budget holds of them."""

import pytest
from allocation import (
    RANK_ALLOCATORS,
    assert_invariants,
    make_cosines,
    make_curves,
    make_linears,
    make_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate import make_allocator
from orchestrator.allocate.budget import Budget
from orchestrator.errors import UsageError
from orchestrator.plan.forms import LOW_RANK, PIVOTED

ROLES = {"self_attn.q_proj": (48, 48), "self_attn.v_proj": (16, 48), "mlp.down_proj": (48, 96)}
MODEL = make_model(ROLES, blocks=3)

every_allocator = pytest.mark.parametrize(
    "name", [name for name in RANK_ALLOCATORS if name != "d-rank"]
)


@pytest.mark.parametrize(("keep", "gain"), [(0.8, 0.38), (0.6, 0.23), (0.4, 0.127)])
def test_the_same_values_hold_more_ranks(keep, gain):
    """A square weight holds 38, 23 and 13 % more at 0.8, 0.6 and 0.4 kept, as PIFA has it."""
    ranks = []
    (linear,) = make_linears([(4096, 4096)])
    for form in (LOW_RANK, PIVOTED):
        plan = make_allocator("uniform", {})([linear], {}, Budget(keep, form), {})
        assert plan.slack_values < linear.rank_cost
        ranks.append(plan.assignments[linear.name].rank)
    assert ranks[1] / ranks[0] - 1 == pytest.approx(gain, abs=0.005)


@every_allocator
@given(percent=st.integers(20, 98), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_allocators_keep_the_laws(name, percent, seed):
    """Pivoted ranks stay within the budget and below break-even; nothing is stored plain."""
    options = {"mgaa": {"low": 0.1}, "strs": {"grid": "0.1 0.3 0.6 0.8 0.9"}}.get(name, {})
    allocator, keep = make_allocator(name, options), percent / 100
    curves = make_curves(MODEL, seed, PIVOTED)
    plan = allocator(MODEL, curves, Budget(keep, PIVOTED), make_cosines(MODEL, seed))
    assert_invariants(plan, MODEL, keep, PIVOTED)
    assert {each.form for each in plan.assignments.values()} <= {"pivoted", "dense"}


@pytest.mark.parametrize("setting", ["exact", "paper"])
def test_one_price_a_rank_is_said_to_be_needed(setting):
    """D-Rank's formulas have one price for every rank, and refuse pivoted ones."""
    allocator = make_allocator("d-rank", {"setting": setting})
    with pytest.raises(UsageError, match="d-rank: its formulas want one price"):
        allocator(MODEL, make_curves(MODEL), Budget(0.6, PIVOTED), {})
