"""Products of factors stored as pivot rows and combinations of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gaussian, orthonormal

from orchestrator.errors import InputError
from orchestrator.linalg.pivot import BOUND, Pivoted, pivot


def rebuilt(found: Pivoted):
    """Rebuild the rows from the stored tensors, in float64, by definition."""
    kept_RI = found.down_RI.double()
    return torch.cat([kept_RI, found.weight_SR.double() @ kept_RI])[found.order_O]


def off(product_OI, found: Pivoted) -> float:
    """Relative error of the rebuilt product."""
    return float((rebuilt(found) - product_OI).norm() / product_OI.norm())


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(2, 24),
    inputs=st.integers(1, 24),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_nothing_is_lost_at_any_rank(outputs, inputs, data, dtype):
    """Every product is reproduced to rounding, from R (O + I) - R^2 values."""
    rank = data.draw(st.integers(1, outputs - 1))
    weight_OR = gaussian(outputs, rank, seed=data.draw(st.integers(0, 99))).to(dtype)
    down_RI = gaussian(rank, inputs, seed=7).to(dtype)
    found = pivot(weight_OR, down_RI)
    product_OI = weight_OR.double() @ down_RI.double()
    bound = 1e-6 if dtype == torch.float32 else 1e-13
    assert off(product_OI, found) < bound
    assert found.report["error"] == pytest.approx(off(product_OI, found), rel=1e-3, abs=1e-15)
    values = found.weight_SR.numel() + found.down_RI.numel()
    assert values == rank * (outputs + inputs) - rank**2
    assert {found.weight_SR.dtype, found.down_RI.dtype} == {dtype}
    assert found.order_O.sort().values.tolist() == list(range(outputs))


def test_the_pivots_are_rows_of_the_product():
    """Pivots are unchanged rows of the product, and the order of all rows is stored."""
    weight_OR, down_RI = gaussian(9, 4), gaussian(4, 6, seed=1)
    found = pivot(weight_OR, down_RI)
    places = found.order_O.argsort()
    torch.testing.assert_close(found.down_RI, (weight_OR @ down_RI)[places[:4]])
    assert places[:4].tolist() == sorted(places[:4].tolist())
    assert places[4:].tolist() == sorted(places[4:].tolist())


@pytest.mark.parametrize("rank", [1, 5, 11, 20])
def test_no_coefficient_is_large(rank):
    """Coefficients that are large after elimination are reduced by exchanges of pivots."""
    for seed in range(20):
        found = pivot(orthonormal(21, rank, seed=seed), gaussian(rank, 3))
        assert float(found.weight_SR.abs().max()) <= BOUND * (1 + 1e-12)
        assert found.report["largest"] == float(found.weight_SR.abs().max())


def test_growth_of_elimination_is_exchanged_away():
    """Coefficients are small even for a matrix whose elimination doubles at every step."""
    size = 12
    lower = torch.eye(size, dtype=torch.float64) - torch.ones(size, size).tril(-1).double()
    weight_OR = torch.cat([lower, torch.ones(1, size, dtype=torch.float64)])
    found = pivot(weight_OR, torch.eye(size, dtype=torch.float64))
    assert found.report["largest"] <= BOUND * (1 + 1e-12)
    assert off(weight_OR, found) < 1e-13


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_dependent_columns_lose_nothing_either(rank):
    """Factors of a smaller rank than their size, including zero, are reproduced to rounding."""
    weight_OR = gaussian(10, rank) @ gaussian(rank, 5, seed=1)
    down_RI = gaussian(5, 8, seed=2)
    found = pivot(weight_OR, down_RI)
    gap = rebuilt(found) - weight_OR @ down_RI
    assert float(gap.abs().max()) < 1e-13
    assert found.report["error"] < 1e-13
    assert found.report["largest"] <= BOUND * (1 + 1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    """Scaled factors have the same coefficients and scaled rows."""
    weight_OR, down_RI = gaussian(9, 4), gaussian(4, 6, seed=1)
    found, scaled = pivot(weight_OR, down_RI), pivot(weight_OR * scale, down_RI)
    torch.testing.assert_close(scaled.weight_SR, found.weight_SR)
    torch.testing.assert_close(scaled.down_RI, found.down_RI * scale)


def test_the_same_factors_give_the_same_bits():
    """The bits depend on the factors only."""
    weight_OR, down_RI = orthonormal(40, 15).float(), gaussian(15, 30).float()
    one, two = pivot(weight_OR, down_RI), pivot(weight_OR.clone(), down_RI.clone())
    assert torch.equal(one.weight_SR, two.weight_SR)
    assert torch.equal(one.down_RI, two.down_RI)
    assert torch.equal(one.order_O, two.order_O)


@pytest.mark.parametrize(("outputs", "rank", "rows"), [(4, 4, 4), (4, 5, 5), (4, 0, 0), (4, 2, 3)])
def test_what_is_no_pair_of_factors_is_refused(outputs, rank, rows):
    """A rank equal to the outputs, and factors of different ranks, are refused."""
    with pytest.raises(ValueError, match="need one rank, in 1 to 3"):
        pivot(gaussian(outputs, rank), gaussian(rows, 6))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_not_finite_is_refused(side):
    """NaN in a factor raises an error that names the factor."""
    weight_OR, down_RI = gaussian(5, 2), gaussian(2, 3)
    (weight_OR if side == "left" else down_RI)[0, 0] = torch.nan
    with pytest.raises(InputError, match=f"{side} factor"):
        pivot(weight_OR, down_RI)
