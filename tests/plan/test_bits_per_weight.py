"""Bits per weight and compression rates: closed forms, limits, and the index between them."""

import pytest
from allocation import make_linears
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import FORMS
from orchestrator.plan.forms.index_sizes import smallest_index
from orchestrator.plan.plan import Assignment
from orchestrator.plan.result import (
    bits_per_weight,
    bits_texts,
    compression_rates,
    theoretical_rate,
)

SIDES = st.integers(1, 60)


def report_of(linear, assignment, codec):
    """The sizes that the report of a compression of one linear has."""
    return {
        "bytes": {
            "stored": assignment.stored_bytes(linear, codec),
            "dense_linears": codec.bytes(linear.values),
        },
        "values": {"stored": assignment.stored_values(linear), "dense_linears": linear.values},
    }


@pytest.mark.parametrize(
    ("bits", "sparsity", "rate"), [(3, 0, 0.8125), (4, 0.25, 0.8125), (4, 0, 0.75), (2, 0, 0.875)]
)
def test_rates_of_the_paper(bits, sparsity, rate):
    """3 bits save as much as 4 bits with 25 % zeros, 81.25 %; 4 bits save 75 %, 2 bits 87.5 %."""
    assert theoretical_rate(bits, sparsity) == rate


@given(sparsity=st.floats(0, 1), bits=st.floats(0.5, 16))
def test_limits_of_the_rate(sparsity, bits):
    """Without zeros it is 1 - q / 16, of 16 bits the sparsity, and it saves no less with more."""
    assert theoretical_rate(bits, 0) == 1 - bits / 16
    assert theoretical_rate(16, sparsity) == pytest.approx(sparsity, abs=1e-15)
    assert theoretical_rate(bits, 1) == 1
    assert theoretical_rate(bits, 0) <= theoretical_rate(bits, sparsity) <= 1


def test_a_quarter_of_zeros_at_four_bits_saves_nothing():
    """3 of 4 values at 4 bits, and the smallest index, which takes a bit: 4 bits per weight."""
    outputs, inputs = 1024, 4096
    kept = 3 * outputs * inputs // 4
    index = 8 * smallest_index(outputs, inputs, kept) / (outputs * inputs)
    assert index == 1
    assert 16 * (1 - theoretical_rate(4, 0.25)) + index == 16 * (1 - theoretical_rate(4, 0))


@pytest.mark.parametrize("name", list(FORMS))
@given(outputs=SIDES, inputs=SIDES, data=st.data())
def test_stored_bits_are_those_of_values_and_of_the_index(name, outputs, inputs, data):
    """No form stores less than in theory; the difference is the index, and 0 without one."""
    (linear,), form = make_linears([(outputs, inputs)]), FORMS[name]
    most = min(outputs, inputs)
    cut = Assignment(
        form=name,
        rank=data.draw(st.integers(1, most)) if form.has_rank else 0,
        nonzeros=data.draw(st.integers(0, linear.values)) if form.has_nonzeros else 0,
    )
    report = report_of(linear, cut, CODECS["bfloat16"])
    bits, (real, theory) = bits_per_weight(report), compression_rates(report)
    kept = cut.stored_values(linear) / linear.values
    index = 8 * form.index_bytes(linear, cut) / linear.values
    assert theory == pytest.approx(1 - kept, abs=1e-12)
    assert bits == pytest.approx(16 * kept + index)
    assert 16 * (theory - real) == pytest.approx(index, abs=1e-9)
    assert bits >= 16 * kept


def test_no_rate_counts_from_more_than_16_bits():
    """The bits are known then, without a rate; without sizes nothing is."""
    (linear,) = make_linears([(8, 8)])
    report = report_of(linear, Assignment(form="low_rank", rank=2), CODECS["float32"])
    assert (bits_per_weight(report), compression_rates(report)) == (16, None)
    assert bits_texts(report) == ("16.000", "")
    assert bits_per_weight({}) is compression_rates({}) is bits_texts({}) is None
