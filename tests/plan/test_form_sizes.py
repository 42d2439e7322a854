"""Sizes of the forms: stored values and bytes, break-even ranks, ranks within given values."""

import numpy as np
import pytest
from allocation import make_linears
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.allocate.steps import step_costs
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import AFFINE, FORMS, LOW_RANK, PIVOTED, stored_as
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

SIDES = st.integers(1, 60)
FACTORED = st.sampled_from([LOW_RANK, AFFINE, PIVOTED])


def linear_of(outputs, inputs):
    (linear,) = make_linears([(outputs, inputs)])
    return linear


@given(outputs=SIDES, inputs=SIDES, form=FACTORED)
def test_steps_cost_what_ranks_store(outputs, inputs, form):
    """Step r of pivoted factors adds m + n - 2 r + 1 values; the first of affine ones their m
    biases; steps end with the dense weight."""
    linear = linear_of(outputs, inputs)
    costs = step_costs(linear, AllowedRanks(form))
    assert costs.dtype == np.int64
    assert costs.min() > 0
    stored = [
        Assignment(form=form.name, rank=rank).stored_values(linear) for rank in range(len(costs))
    ]
    assert np.cumsum(costs).tolist() == [*stored[1:], linear.values]
    if form is PIVOTED and len(costs) > 1:
        ranks = np.arange(1, len(costs))
        assert costs[:-1].tolist() == (outputs + inputs - 2 * ranks + 1).tolist()
    if form is AFFINE and len(costs) > 1:
        added = [inputs + outputs + outputs, *[outputs + inputs] * (len(costs) - 2)]
        assert costs[:-1].tolist() == added
    assert form.has_fixed_price == (form is LOW_RANK)


@given(outputs=SIDES, inputs=SIDES, form=FACTORED, data=st.data())
def test_the_rank_within_a_number_of_values_is_the_largest(outputs, inputs, form, data):
    """It stores no more than the values, and the next rank does."""
    linear = linear_of(outputs, inputs)
    values = data.draw(st.integers(0, linear.values))
    rank = form.rank_within(linear, values)
    assert form.factor_values(linear, rank) <= values or not rank
    if form is not PIVOTED or rank < form.break_even(linear):
        assert form.factor_values(linear, rank + 1) > values


@given(outputs=SIDES, inputs=SIDES, form=FACTORED)
def test_every_rank_below_break_even_saves_values(outputs, inputs, form):
    """And break-even itself saves none."""
    linear = linear_of(outputs, inputs)
    for rank in range(1, form.break_even(linear)):
        assert Assignment(form=form.name, rank=rank).stored_values(linear) < linear.values
    if form is PIVOTED:
        assert form.factor_values(linear, form.break_even(linear)) == linear.values


@given(outputs=SIDES, inputs=SIDES)
def test_the_least_of_a_form_is_its_smallest_cut(outputs, inputs):
    """Rank 1 of factors, also beside entries, or the dense weight; one entry of a sparse weight."""
    linear = linear_of(outputs, inputs)
    for form in FORMS.values():
        least = form.least_values(linear)
        if form.has_rank:
            rank_one = form.factor_values(linear, 1)
            assert least == (rank_one if form.break_even(linear) > 1 else linear.values)
        elif form.has_nonzeros:
            assert least == 1


def test_the_form_of_factors_is_the_method_s_or_that_of_the_storage():
    """Plain factors stay as the method has them; others take the form that storage names."""
    assert stored_as("low_rank", "plain") is LOW_RANK
    assert stored_as("low_rank", "pivoted") is PIVOTED
    assert stored_as("sparse", "plain").name == "sparse"
    assert {name: form.name for name, form in FORMS.items()} == {name: name for name in FORMS}


@pytest.mark.parametrize(
    ("assignment", "values", "index"),
    [
        (Assignment(form="dense"), 60_000, 0),
        (Assignment(form="low_rank", rank=7), 7 * 500, 0),
        (Assignment(form="low_rank", rank=7, basis="a"), 7 * 200, 0),
        (Assignment(form="affine", rank=7), 7 * 500 + 200, 0),
        (Assignment(form="pivoted", rank=7), 7 * 493, 800),
        (Assignment(form="pivoted", rank=199), 59_899, 800),
        (Assignment(form="sparse", nonzeros=30_000), 30_000, 7_500),
        (Assignment(form="sparse", nonzeros=1_000), 1_000, 2_804),
        (Assignment(form="low_rank_sparse", rank=7, nonzeros=10), 3_510, 40),
    ],
)
def test_what_a_form_stores(assignment, values, index):
    """Values by the formula, and bytes with the smallest index, worked out by hand."""
    linear = Linear(
        name="b",
        block=0,
        role="b",
        site="b",
        out_features=200,
        in_features=300,
        has_bias=False,
    )
    assert assignment.stored_values(linear) == values
    assert assignment.stored_bytes(linear, CODECS["bfloat16"]) == 2 * values + index
    assert assignment.stored_bytes(linear, CODECS["float32"]) == 4 * values + index
