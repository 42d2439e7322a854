"""Both halves of every form, its sizes and its module, say the same."""

import math

import pytest
import torch
from allocation import make_linears
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import StoredForm
from orchestrator.plan.forms import FORMS as SIZES
from orchestrator.plan.plan import Assignment

every_form = pytest.mark.parametrize("name", FORMS)


@st.composite
def assignments(draw, name):
    """A linear, and an assignment of this form that may store more than the dense weight."""
    outputs, inputs = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    (linear,) = make_linears([(outputs, inputs)])
    rank = draw(st.integers(1, min(outputs, inputs) - 1 or 1)) if SIZES[name].has_rank else 0
    nonzeros = draw(st.integers(1, linear.values)) if SIZES[name].has_nonzeros else 0
    shares = "basis" in FORMS[name].optional and draw(st.booleans())
    assignment = Assignment(
        form=name, rank=rank, nonzeros=nonzeros, basis="blocks.9" if shares else ""
    )
    code = SIZES[name].index_code(linear, assignment)
    stored = StoredForm(form=name, rank=rank, nonzeros=nonzeros, index=code, basis=assignment.basis)
    return linear, assignment, stored


def test_the_halves_have_the_same_forms():
    """Every form but the dense one has a module, under its own name, and the fields of its size."""
    assert {*FORMS} == {*SIZES} - {"dense"}
    for name, module in FORMS.items():
        assert module.form == name
        assert ("rank" in module.fields) == SIZES[name].has_rank
        assert ("nonzeros" in module.fields) == SIZES[name].has_nonzeros


@every_form
@given(data=st.data())
def test_the_tensors_are_what_the_plan_counts(name, data):
    """Values, and bytes of the index, are those of the tensors that are stored."""
    linear, assignment, stored = data.draw(assignments(name))
    sizes = linear.out_features, linear.in_features
    tensors = FORMS[name].tensors(stored, *sizes)
    index = [tensor for tensor in tensors if tensor.dtype is not None]
    assert FORMS[name].stored_values(stored, *sizes) == assignment.stored_values(linear)
    bytes_of_index = sum(math.prod(each.shape) * each.dtype.itemsize for each in index)
    assert bytes_of_index == SIZES[name].index_bytes(linear, assignment)


@every_form
@given(data=st.data())
def test_a_module_has_the_tensors_of_its_form(name, data):
    """Names, shapes and dtypes; a basis that is another linear's is there and not stored."""
    linear, _, stored = data.draw(assignments(name))
    sizes = linear.out_features, linear.in_features
    options = {"bias": True, "device": torch.device("meta"), "dtype": torch.bfloat16}
    shares = bool(stored.basis)
    module = FORMS[name].make(stored, *sizes[::-1], shares_basis=shares, **options)
    found = {n: (each.dtype, tuple(each.shape)) for n, each in module.state_dict().items()}
    declared = {
        tensor.name: (tensor.dtype or torch.bfloat16, tensor.shape)
        for tensor in FORMS[name].tensors(stored, *sizes)
    }
    shape = (stored.rank, sizes[1])
    if FORMS[name].basis_tensor == "weight":
        shape = (sizes[0], stored.rank or sizes[1])
    shared = {FORMS[name].basis_tensor: (torch.bfloat16, shape)} if shares else {}
    bias = {"bias": (torch.bfloat16, (sizes[0],))} if FORMS[name].keeps_bias else {}
    assert found == declared | shared | bias
    assert (module.in_features, module.out_features) == sizes[::-1]
    assert {*module.parts} == {part for part, _ in module.named_children()}


@given(data=st.data())
def test_ranks_fit_below_break_even(data):
    """The module refuses the ranks that the plan's half says save nothing."""
    name = data.draw(st.sampled_from(["low_rank", "affine", "pivoted", "output_basis"]))
    linear, _, stored = data.draw(assignments(name))
    misfit = FORMS[name].misfit(stored, linear.out_features, linear.in_features)
    assert bool(misfit) == (stored.rank >= SIZES[name].break_even(linear))


@given(data=st.data())
def test_entries_fit_where_they_save_values(data):
    """The module refuses what stores as many values as the dense weight."""
    name = data.draw(st.sampled_from(["sparse", "low_rank_sparse"]))
    linear, assignment, stored = data.draw(assignments(name))
    misfit = FORMS[name].misfit(stored, linear.out_features, linear.in_features)
    assert bool(misfit) == (assignment.stored_values(linear) >= linear.values)
