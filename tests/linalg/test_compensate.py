"""Compensated factors, compared with least squares and brute force."""

import numpy as np
import pytest
import torch

from orchestrator.errors import InputError
from orchestrator.linalg.compensate import (
    Drift,
    DriftGram,
    Factors,
    compensate,
    input_map,
    modelled_error,
)
from orchestrator.linalg.gram import FLUSH_TOKENS

O, I, T, R = 7, 9, 60, 3  # noqa: E741 # the dimensions' letters


def rows(count=T, seed=0):
    """Dense inputs x, and inputs z of a compressed model: a noisy rotation of x."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    dense_TI = draw(count, I) @ draw(I, I)
    found_TI = dense_TI @ (torch.eye(I, dtype=torch.float64) + 0.2 * draw(I, I))
    # values representable in float32, so that the float32 products are the only rounding
    return dense_TI.float(), (found_TI + draw(count, I)).float()


def weight(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(O, I, generator=generator, dtype=torch.float64)


def drift_of(dense_TI, found_TI):
    return DriftGram(I).update(found_TI, dense_TI).drift()


def exact_drift(dense_TI, found_TI):
    """Compute the moments by definition, in float64."""
    z, d = found_TI.double(), dense_TI.double() - found_TI.double()
    moments = {"moment_II": z.T @ z, "cross_II": d.T @ z, "spread_II": d.T @ d}
    return Drift(**moments, tokens=len(z))


def truncated(weight_OI, rank=R):
    """Factors with an orthonormal left one, optimal for no particular objective."""
    left_OR = torch.linalg.svd(weight_OI).U[:, :rank]
    return Factors(left_OR=left_OR, down_RI=left_OR.T @ weight_OI)


def direct_error(weight_OI, found_OI, dense_TI, found_TI, beta):
    target_TI = (1 - beta) * found_TI.double() + beta * dense_TI.double()
    return float((target_TI @ weight_OI.T - found_TI.double() @ found_OI.T).square().sum())


def test_moments_are_those_of_the_rows():
    """Moments equal the sums over rows, to float32 products, for several pieces and beyond a
    flush."""
    dense_TI, found_TI = rows(FLUSH_TOKENS + 1000)
    gram = DriftGram(I)
    for piece in (slice(0, 50), slice(50, None)):
        gram.update(found_TI[piece], dense_TI[piece])
    found, expected = gram.drift(), exact_drift(dense_TI, found_TI)
    for name in ("moment_II", "cross_II", "spread_II"):
        one, other = getattr(found, name), getattr(expected, name)
        assert float((one - other).norm() / other.norm()) < 1e-5
    assert found.tokens == len(found_TI)


def test_equal_inputs_drift_nowhere():
    """Equal inputs give E = D = 0 and M = 1 to the bit, and the factors are kept."""
    _, found_TI = rows()
    drift = drift_of(found_TI, found_TI)
    assert not drift.cross_II.any()
    assert not drift.spread_II.any()
    turn = input_map(drift, 1.0, 1e-3)
    assert torch.equal(turn.matrix_II, torch.eye(I, dtype=torch.float64))
    factors = truncated(weight())
    result = compensate(weight(), factors, drift, turn, beta=1.0, basis="kept")
    assert not result.taken
    assert result.factors is factors


def test_without_dense_rows_the_drift_is_zero():
    """With z alone, the moments are those for x = z."""
    _, found_TI = rows()
    alone, same = DriftGram(I).update(found_TI).drift(), drift_of(found_TI, found_TI)
    for name in ("moment_II", "cross_II", "spread_II"):
        assert torch.equal(getattr(alone, name), getattr(same, name))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_map_is_the_least_squares_solution(beta):
    """With full rank and no ridge, W M is numpy's lstsq on explicit x and z."""
    dense_TI, found_TI = rows()
    turn = input_map(exact_drift(dense_TI, found_TI), beta, 0.0)
    target_TI = (1 - beta) * found_TI.double() + beta * dense_TI.double()
    solved_IO, *_ = np.linalg.lstsq(found_TI.double(), target_TI @ weight().T, rcond=None)
    np.testing.assert_allclose(weight() @ turn.matrix_II, solved_IO.T, rtol=1e-9, atol=1e-9)
    assert turn.report["residual"] < 1e-12
    assert turn.report["condition"] > 1


def test_the_ridge_leads_to_the_identity():
    """A large ridge gives the identity; a moderate one gives the ridge solution."""
    drift = exact_drift(*rows())
    eye_II = torch.eye(I, dtype=torch.float64)
    maps = [input_map(drift, 1.0, damping).matrix_II for damping in (0, 0.1, 10.0, 1e6)]
    gaps = [float((each - eye_II).norm()) for each in maps]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-5
    ridge_II = 0.1 * drift.moment_II.diagonal().mean() * eye_II
    cross_II = drift.cross_II + drift.moment_II
    expected_II = torch.linalg.solve(drift.moment_II + ridge_II, cross_II + ridge_II, left=False)
    torch.testing.assert_close(maps[1], expected_II)


def test_directions_without_data_stay():
    """With fewer tokens than channels, M is finite, and the identity on directions without
    input."""
    dense_TI, found_TI = rows(4)
    drift = exact_drift(dense_TI, found_TI)
    matrix_II = input_map(drift, 1.0, 1e-6).matrix_II
    _, _, basis_II = torch.linalg.svd(found_TI.double())
    unseen_IN = basis_II[4:].T
    torch.testing.assert_close(matrix_II @ unseen_IN, unseen_IN, rtol=1e-6, atol=1e-6)


def test_a_solve_that_fails_leaves_the_factors():
    """Without tokens and ridge, the failure is reported and the given factors are used."""
    drift = exact_drift(*rows(0))
    turn = input_map(drift, 1.0, 0.0)
    assert turn.matrix_II is None
    result = compensate(weight(), truncated(weight()), drift, turn, beta=1.0, basis="new")
    assert (result.taken, result.report["trouble"]) == (False, "singular")


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_modelled_error_is_that_of_the_tokens(beta):
    """The closed form of the moments is the sum over explicit tokens."""
    dense_TI, found_TI = rows()
    found_OI = truncated(weight()).product()
    modelled = modelled_error(weight(), found_OI, exact_drift(dense_TI, found_TI), beta)
    assert modelled == pytest.approx(direct_error(weight(), found_OI, dense_TI, found_TI, beta))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_new_factors_are_the_best_of_their_rank(beta):
    """New factors reach the optimum of the theorem, and nearby factors of the rank are not
    better."""
    dense_TI, found_TI = rows()
    drift = exact_drift(dense_TI, found_TI)
    turn = input_map(drift, beta, 0.0)
    result = compensate(weight(), truncated(weight()), drift, turn, beta=beta, basis="new")
    assert result.taken
    found = direct_error(weight(), result.factors.product(), dense_TI, found_TI, beta)
    # the part that no W' can reach, and the truncated singular values
    z = found_TI.double()
    target_TO = ((1 - beta) * z + beta * dense_TI.double()) @ weight().T
    fitted_TO = z @ torch.linalg.lstsq(z, target_TO).solution
    cut = torch.linalg.svdvals(fitted_TO)[R:].square().sum()
    assert found == pytest.approx(float((target_TO - fitted_TO).square().sum() + cut))
    generator = torch.Generator().manual_seed(5)
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(30):
            left_OR, down_RI = (
                each + scale * torch.randn(each.shape, generator=generator, dtype=each.dtype)
                for each in (result.factors.left_OR, result.factors.down_RI)
            )
            other = direct_error(weight(), left_OR @ down_RI, dense_TI, found_TI, beta)
            assert other >= found


def test_the_kept_basis_takes_its_best_right_factor_in_any_norm():
    """If U^T S U = 1 and down = U^T S W, `down M` is the least-squares right factor in the S
    norm."""
    dense_TI, found_TI = rows()
    generator = torch.Generator().manual_seed(8)
    half_OO = torch.randn(O, O, generator=generator, dtype=torch.float64)
    norm_OO = half_OO @ half_OO.T
    basis_OR = torch.randn(O, R, generator=generator, dtype=torch.float64)
    upper_RR = torch.linalg.cholesky(basis_OR.T @ norm_OO @ basis_OR, upper=True)
    left_OR = torch.linalg.solve_triangular(upper_RR, basis_OR, upper=True, left=False)
    factors = Factors(left_OR=left_OR, down_RI=left_OR.T @ norm_OO @ weight())
    drift = exact_drift(dense_TI, found_TI)
    result = compensate(
        weight(), factors, drift, input_map(drift, 1.0, 0.0), beta=1.0, basis="kept"
    )
    assert result.taken
    assert torch.equal(result.factors.left_OR, left_OR)
    # vec(S^1/2 U D z) = vec(S^1/2 W x), both sides times the symmetric root of S
    values_O, vectors_OO = torch.linalg.eigh(norm_OO)
    root_OO = vectors_OO @ torch.diag(values_O.sqrt()) @ vectors_OO.T
    target_TO = dense_TI.double() @ weight().T @ root_OO
    outer_RT = torch.linalg.lstsq(root_OO @ left_OR, target_TO.T).solution
    best_IR = torch.linalg.lstsq(found_TI.double(), outer_RT.T).solution
    torch.testing.assert_close(result.factors.down_RI, best_IR.T)


def test_entries_beside_new_factors_are_made_up_for():
    """New factors approximate the target less the contribution of the entries."""
    dense_TI, found_TI = rows()
    drift = exact_drift(dense_TI, found_TI)
    rest_OI = torch.where(weight(3).abs() > 1.5, weight(3), 0.0)
    plain = truncated(weight() - rest_OI)
    factors = Factors(left_OR=plain.left_OR, down_RI=plain.down_RI, rest_OI=rest_OI)
    turn = input_map(drift, 1.0, 0.0)
    result = compensate(weight(), factors, drift, turn, beta=1.0, basis="new")
    z = found_TI.double()
    target_TO = dense_TI.double() @ weight().T - z @ rest_OI.T
    fitted_TO = z @ torch.linalg.lstsq(z, target_TO).solution
    cut = torch.linalg.svdvals(fitted_TO)[R:].square().sum()
    found = direct_error(weight(), result.factors.product(), dense_TI, found_TI, 1.0)
    assert found == pytest.approx(float((target_TO - fitted_TO).square().sum() + cut))


@pytest.mark.parametrize("basis", ["kept", "new"])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
def test_never_worse_on_its_own_objective(basis, damping):
    """Accepted factors lower the error; others are rejected and reported."""
    for seed in range(10):
        drift = exact_drift(*rows(8 + 5 * seed, seed))
        turn = input_map(drift, 1.0, damping)
        result = compensate(
            weight(seed), truncated(weight(seed)), drift, turn, beta=1.0, basis=basis
        )
        assert result.report["after"] <= result.report["before"]
        assert result.taken == (result.report["after"] < result.report["before"])
        assert result.taken or {"rejected", "trouble"} & result.report.keys()


def test_what_does_not_fit_is_refused():
    """Rows with different numbers of tokens, and non-finite rows, are refused."""
    dense_TI, found_TI = rows()
    with pytest.raises(ValueError, match=r"rows are \(59, 9\), the others \(60, 9\)"):
        DriftGram(I).update(found_TI, dense_TI[1:])
    dense_TI[3, 4] = torch.nan
    with pytest.raises(InputError, match="non-finite"):
        DriftGram(I).update(found_TI, dense_TI).drift()
