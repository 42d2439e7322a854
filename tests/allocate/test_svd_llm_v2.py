"""SVD-LLM v2: removed fractions by the inverse logarithm of the loss."""

import math

import numpy as np
import pytest
from allocation import make_curve, make_linears
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.svd_llm_v2 import SvdLlmV2Allocator
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import InfeasibleError, UsageError

SIDE, COST = 200, 400


def with_losses(losses, keep):
    """Make linears of one type, and curves with these losses at the uniform rank, as norms."""
    linears = make_linears([(SIDE, SIDE)] * len(losses))
    uniform = int(keep * SIDE * SIDE) // COST
    curves = {}
    for linear, loss in zip(linears, losses, strict=True):
        tail = np.full(SIDE - uniform, loss**2 / (SIDE - uniform))
        head = np.full(uniform, 1 + loss**2)
        curves[linear.name] = make_curve(linear.name, [*head, *tail])
    return linears, curves


def ranks_at(losses, keep, **options):
    linears, curves = with_losses(losses, keep)
    plan = SvdLlmV2Allocator(**options)(linears, curves, Budget(keep), cosines={})
    return [assignment.rank for assignment in plan.assignments.values()]


def test_the_formula_of_the_paper():
    """Losses e², e⁴, e⁸ score 1/2, 1/4, 1/8: at keep 0.65, 0.6, 0.3 and 0.15 of them are
    removed."""
    assert ranks_at([math.e**2, math.e**4, math.e**8], 0.65) == [40, 70, 85]


def test_equal_losses_are_uniform():
    """Without differences between the linears of a type the result is uniform."""
    linears, curves = with_losses([50.0] * 4, 0.8)
    plan = SvdLlmV2Allocator()(linears, curves, Budget(0.8), cosines={})
    assert plan == Uniform()(linears, curves, Budget(0.8), cosines={})


@given(
    losses=st.lists(st.floats(0, 1e6), min_size=2, max_size=6, unique=True),
    keep=st.sampled_from([0.3, 0.5, 0.8, 0.95]),
)
@settings(deadline=None, max_examples=60)
def test_what_loses_more_keeps_more(losses, keep):
    """Ranks ascend with the loss, up to a remainder of one, and spend the type's share."""
    linears, curves = with_losses(sorted(losses), keep)
    plan = SvdLlmV2Allocator()(linears, curves, Budget(keep), cosines={})
    stored = [plan.assignments[each.name].stored_values(each) for each in linears]
    assert np.all(np.diff(stored) >= -2 * COST)
    assert plan.slack_values < 2 * COST


def test_a_loss_of_one_or_less_is_cut_to_the_cap_first():
    """A loss of 1 or less is the limit of the formula; the rest is shared by the formula."""
    for small in (1.0, 0.3, 0.0):
        assert ranks_at([small, 100.0, 100.0], 0.65) == [5, 95, 95]


def test_several_at_the_limit_are_cut_alike():
    """If less than the cap of all of them must be removed, they share it equally."""
    assert ranks_at([0.5, 0.1, 100.0], 0.7)[:2] == [55, 55]


def test_no_linear_loses_more_than_the_cap():
    """The excess over the cap is removed from the others, so that the budget is met."""
    assert ranks_at([1.001, math.e**2, math.e**4], 0.5, most_removed=0.8) == [20, 53, 77]


def test_more_than_the_cap_on_all_is_infeasible():
    """The message has both numbers."""
    linears, curves = with_losses([10.0, 20.0], 0.1)
    with pytest.raises(InfeasibleError, match=r"0\.1.*0\.8.*most_removed"):
        SvdLlmV2Allocator(most_removed=0.8)(linears, curves, Budget(0.1), cosines={})


@pytest.mark.parametrize("most", [-0.1, 1.1, math.nan, "all"])
def test_an_option_outside_its_range_is_refused(most):
    """The message has the option, its value and the allowed values."""
    with pytest.raises(UsageError, match=r"svd-llm-v2: most_removed.*0 to 1"):
        SvdLlmV2Allocator(most_removed=most)
