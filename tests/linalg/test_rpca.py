"""Robust PCA: recovery, optimality, laws, and difficult cases."""

import math
from functools import cache

import pytest
import torch
from benchmarks.rpca import textbook
from matrices import gaussian, generator, orthonormal
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.sparsity.rpca import RobustPCA, rpca

SHAPES = [(90, 60), (60, 90), (70, 70)]

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_precision = pytest.mark.parametrize("precision", ["exact", "fast"])
every_solver = pytest.mark.parametrize("solver", ["ialm", "admm_fixed_mu"])


def like_a_weight(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Make a weight with dominant directions, noise and dominant entries."""
    rank = min(outputs, inputs) // 6
    low_rank_OI = gaussian(outputs, rank, seed=seed) @ gaussian(rank, inputs, seed=seed + 1)
    noise_OI = gaussian(outputs, inputs, seed=seed + 2)
    return low_rank_OI / rank**0.5 + noise_OI + 0.1 * noise_OI**5


@cache
def split(shape: tuple[int, int], solver: str, precision: str) -> RobustPCA:
    """Robust PCA of a weight; not to be changed."""
    return rpca(like_a_weight(*shape), solver=solver, precision=precision)


def low_rank_and_sparse(outputs: int, inputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """Generic L, and S of 4 % nonzeros as large as L's entries."""
    left_OR, right_IR = orthonormal(outputs, rank), orthonormal(inputs, rank, seed=1)
    low_rank_OI = (left_OR * torch.linspace(2, 1, rank)) @ right_IR.T * (outputs * inputs) ** 0.5
    chosen_OI = torch.rand(outputs, inputs, dtype=torch.float64, generator=generator(2)) < 0.04
    return low_rank_OI, torch.where(chosen_OI, 3 * gaussian(outputs, inputs, seed=3), 0.0)


def low_rank_of(result: RobustPCA) -> Tensor:
    return result.weight_OR @ result.down_RI


def sparse_of(result: RobustPCA) -> Tensor:
    sparse_OI = result.values_N.new_zeros(len(result.weight_OR), result.down_RI.shape[1])
    sparse_OI.view(-1)[result.positions_N.long()] = result.values_N
    return sparse_OI


def objective(result: RobustPCA) -> float:
    """|L|_* + lambda |S|_1."""
    low_rank_OI = low_rank_of(result)
    penalty = 1 / math.sqrt(max(low_rank_OI.shape))
    nuclear = torch.linalg.svdvals(low_rank_OI).sum()
    return float(nuclear + penalty * result.values_N.abs().sum())


@pytest.mark.parametrize("shape", [(100, 70), (70, 100), (80, 80)])
@every_precision
@every_solver
def test_recovers_what_was_put_together(shape, precision, solver):
    """Generic L and S are recovered to 1e-6, with the rank of L and the support of S."""
    low_rank_OI, sparse_OI = low_rank_and_sparse(*shape, rank=3)
    weight_OI = low_rank_OI + sparse_OI
    options = {"tolerance": 1e-8, "max_iterations": 2000}
    result = rpca(weight_OI, solver=solver, precision=precision, **options)
    assert result.report["converged"] is True
    assert result.report["rank"] == 3
    assert (low_rank_of(result) - low_rank_OI).norm() <= 1e-6 * low_rank_OI.norm()
    assert (sparse_of(result) - sparse_OI).norm() <= 1e-6 * sparse_OI.norm()
    assert torch.equal(result.positions_N.long(), sparse_OI.flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("rank", [3, 20, 60])
@every_shape
def test_thresholding_is_that_of_a_full_svd(shape, rank):
    """The first L of a fixed mu is U max(sigma - 4 mean|W|, 0) V^T of the weight, to 1e-12."""
    sigma_K = torch.linspace(1, 0.01, rank, dtype=torch.float64)
    weight_OI = (orthonormal(shape[0], rank) * sigma_K) @ orthonormal(shape[1], rank, seed=1).T
    result = rpca(weight_OI, solver="admm_fixed_mu", precision="exact", max_iterations=1)
    left_OO, sigma_K, right_II = torch.linalg.svd(weight_OI)
    shrunk_K = (sigma_K - 4 * weight_OI.abs().mean()).clamp(min=0)
    size = len(sigma_K)
    expected_OI = (left_OO[:, :size] * shrunk_K) @ right_II[:size]
    torch.testing.assert_close(low_rank_of(result), expected_OI, rtol=0, atol=1e-12)
    kept = int((shrunk_K > 0).sum())
    assert len(result.sigma_R) == kept > 0
    torch.testing.assert_close(result.sigma_R, shrunk_K[:kept], rtol=0, atol=1e-12)


@every_shape
@every_solver
def test_follows_the_textbook(shape, solver):
    """Iterations, rank and support equal those of the loop with a thin SVD, L to 1e-9."""
    weight_OI = like_a_weight(*shape)
    tolerance, most = (1e-7, 100) if solver == "ialm" else (1e-6, 200)
    low_rank_OI, sparse_OI, _, iterations = textbook(weight_OI, solver, tolerance, most)
    result = split(shape, solver, "exact")
    assert result.report["iterations"] == iterations
    assert result.report["rank"] == int(torch.linalg.matrix_rank(low_rank_OI, rtol=1e-8))
    assert torch.equal(sparse_of(result) != 0, sparse_OI != 0)
    assert (low_rank_of(result) - low_rank_OI).norm() <= 1e-9 * low_rank_OI.norm()
    assert (sparse_of(result) - sparse_OI).norm() <= 1e-9 * sparse_OI.norm()


@every_shape
@every_solver
def test_fast_agrees_with_exact(shape, solver):
    """`fast` has as many iterations as `exact`, the rank within 1, the support to 1e-5 of the
    entries."""
    weight_OI = like_a_weight(*(2 * side for side in shape))
    exact = rpca(weight_OI, solver=solver, precision="exact")
    fast = rpca(weight_OI, solver=solver, precision="fast")
    assert exact.report["narrow_iterations"] == 0
    assert 0 < fast.report["narrow_iterations"] < fast.report["iterations"]
    assert fast.report["iterations"] == exact.report["iterations"]
    assert abs(fast.report["rank"] - exact.report["rank"]) <= 1
    differ = ((sparse_of(fast) != 0) != (sparse_of(exact) != 0)).sum()
    assert differ <= 1e-5 * weight_OI.numel()
    torch.testing.assert_close(low_rank_of(fast), low_rank_of(exact), rtol=0, atol=3e-5)


@every_solver
def test_fast_ends_in_float64(solver):
    """The last iteration is in float64: of three iterations two are in float32, of one none."""
    weight_OI = like_a_weight(90, 60)
    one = rpca(weight_OI, solver=solver, max_iterations=1)
    exact = rpca(weight_OI, solver=solver, precision="exact", max_iterations=1)
    assert one.report["narrow_iterations"] == 0
    assert torch.equal(one.down_RI, exact.down_RI)
    three = rpca(weight_OI, solver=solver, max_iterations=3)
    assert three.report["narrow_iterations"] == 2
    square_RR = three.weight_OR.T @ three.weight_OR
    torch.testing.assert_close(square_RR, torch.eye(len(square_RR)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)])
def test_is_the_minimum(shape):
    """No Y of |Y|_2 <= 1 and |Y|_inf <= lambda has <Y, W> above the objective; one equals it.

    This Y is the certificate, from the textbook loop; a growing mu ends within 0.3 %.
    """
    weight_OI = like_a_weight(*shape)
    penalty = 1 / math.sqrt(max(shape))
    _, _, dual_OI, _ = textbook(weight_OI, "admm_fixed_mu", 0, 1000)
    excess = max(float(torch.linalg.matrix_norm(dual_OI, 2)), float(dual_OI.abs().max()) / penalty)
    assert excess == pytest.approx(1, abs=1e-8)
    bound = float((dual_OI / max(1, excess) * weight_OI).sum())
    found = rpca(weight_OI, solver="admm_fixed_mu", tolerance=0, max_iterations=1000)
    assert found.report["residual"] <= 1e-10
    assert objective(found) == pytest.approx(bound, rel=1e-9)
    growing = rpca(weight_OI)
    assert bound * (1 - 1e-7) <= objective(growing) <= bound * (1 + 3e-3)


@every_shape
@every_precision
@every_solver
def test_parts_are_what_they_are_called(shape, precision, solver):
    """U is orthonormal, `down` = U^T L, sigma those of L; S is sorted, without zeros."""
    weight_OI, result = like_a_weight(*shape), split(shape, solver, precision)
    low_rank_OI, rank = low_rank_of(result), len(result.sigma_R)
    assert 0 < rank == result.weight_OR.shape[1] == len(result.down_RI) == result.report["rank"]
    square_RR = result.weight_OR.T @ result.weight_OR
    torch.testing.assert_close(square_RR, torch.eye(rank).double(), rtol=0, atol=1e-12)
    sigma_K = torch.linalg.svdvals(low_rank_OI)
    torch.testing.assert_close(result.sigma_R, sigma_K[:rank], rtol=0, atol=1e-10 * sigma_K[0])
    torch.testing.assert_close(result.down_RI.norm(dim=1), sigma_K[:rank], rtol=1e-6, atol=0)
    assert (result.sigma_R.diff() <= 0).all()
    assert result.positions_N.dtype == torch.int32
    assert (result.positions_N.diff() > 0).all()
    assert (result.values_N != 0).all()
    assert result.report["nonzeros"] == len(result.values_N)
    assert result.report["density"] == len(result.values_N) / weight_OI.numel()
    rest = float((weight_OI - low_rank_OI - sparse_of(result)).norm() / weight_OI.norm())
    assert result.report["residual"] == pytest.approx(rest, abs=1e-13)


@pytest.mark.parametrize("iterations", [1, 3, 10, 30])
@every_precision
def test_residual_falls_with_mu(iterations, precision):
    """After k iterations of a growing mu it is at most 1.6 sqrt(K) 1.5^(1 - k)."""
    result = rpca(like_a_weight(90, 60), precision=precision, max_iterations=iterations)
    assert result.report["iterations"] == iterations
    assert result.report["residual"] <= 1.6 * math.sqrt(60) * 1.5 ** (1 - iterations)
    assert result.report["converged"] is False


@every_precision
@every_solver
def test_same_input_same_bits(precision, solver):
    """Two calls give the same bits in every part, and do not change the weight."""
    weight_OI = like_a_weight(90, 60)
    before_OI = weight_OI.clone()
    first, second = (rpca(weight_OI, solver=solver, precision=precision) for _ in range(2))
    for name in ("weight_OR", "down_RI", "sigma_R", "values_N", "positions_N"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.report == second.report
    assert torch.equal(weight_OI, before_OI)


@every_shape
@every_precision
@every_solver
def test_transposing_commutes(shape, precision, solver):
    """The transposed weight has the transposed L and S; S to the bit if O and I differ."""
    upright = split(shape, solver, precision)
    turned = rpca(like_a_weight(*shape).T, solver=solver, precision=precision)
    tolerance = 1e-12 if shape[0] != shape[1] else 1e-4
    torch.testing.assert_close(low_rank_of(turned).T, low_rank_of(upright), rtol=0, atol=tolerance)
    torch.testing.assert_close(sparse_of(turned).T, sparse_of(upright), rtol=0, atol=tolerance)
    if shape[0] != shape[1]:
        assert torch.equal(sparse_of(turned).T, sparse_of(upright))
        assert turned.report == upright.report


@pytest.mark.parametrize("exponent", [-140, -3, 60, 500])
@every_precision
def test_powers_of_two_commute(exponent, precision):
    """2^e W has the same U and positions, and 2^e times the other parts, to the bit."""
    weight_OI = like_a_weight(90, 60)
    plain = rpca(weight_OI, precision=precision)
    scaled = rpca(weight_OI * 2.0**exponent, precision=precision)
    assert torch.equal(scaled.weight_OR, plain.weight_OR)
    assert torch.equal(scaled.positions_N, plain.positions_N)
    for name in ("down_RI", "sigma_R", "values_N"):
        assert torch.equal(getattr(scaled, name), getattr(plain, name) * 2.0**exponent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parts_have_the_weights_dtype(dtype):
    """At least float32, rounded from the same float64 result; singular values stay float64."""
    weight_OI = like_a_weight(90, 60).to(dtype)
    result = rpca(weight_OI)
    wide = rpca(weight_OI.double())
    expected = torch.promote_types(dtype, torch.float32)
    for name in ("weight_OR", "down_RI", "values_N"):
        assert getattr(result, name).dtype == expected
        assert torch.equal(getattr(result, name), getattr(wide, name).to(expected))
    assert result.sigma_R.dtype == torch.float64


@every_shape
@every_precision
@every_solver
def test_nothing_of_nothing(shape, precision, solver):
    """A zero weight has rank 0 and no nonzeros, without any iteration."""
    result = rpca(torch.zeros(shape), solver=solver, precision=precision)
    assert result.weight_OR.shape == (shape[0], 0)
    assert result.down_RI.shape == (0, shape[1])
    assert not len(result.values_N)
    assert (result.report["iterations"], result.report["residual"]) == (0, 0.0)
    assert result.report["converged"] is True


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
@every_precision
@every_solver
def test_vectors(shape, precision, solver):
    """A single row or column is split to the tolerance."""
    weight_OI = gaussian(*shape) + 1
    result = rpca(weight_OI, solver=solver, precision=precision, max_iterations=500)
    assert result.report["converged"] is True
    rest_OI = weight_OI - low_rank_of(result) - sparse_of(result)
    assert rest_OI.norm() <= 1.01e-6 * weight_OI.norm()


@every_precision
@every_solver
def test_dependent_columns(precision, solver):
    """A weight of rank 5 has an L of rank at most 5, and is split to the tolerance."""
    weight_OI = gaussian(90, 5) @ gaussian(5, 60, seed=1)
    result = rpca(weight_OI, solver=solver, precision=precision, max_iterations=500)
    assert result.report["converged"] is True
    assert result.report["rank"] <= 5
    square_RR = result.weight_OR.T @ result.weight_OR
    torch.testing.assert_close(square_RR, torch.eye(len(square_RR)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    """The message has the number of NaN or infinite entries."""
    weight_OI = gaussian(6, 4)
    weight_OI[2, 1] = bad
    with pytest.raises(InputError, match="weight has 1 non-finite of 24 entries"):
        rpca(weight_OI)


def test_what_makes_no_sense():
    """Invalid shapes and limits are refused."""
    with pytest.raises(ValueError, match="outputs, inputs"):
        rpca(torch.ones(3))
    with pytest.raises(ValueError, match="outputs, inputs"):
        rpca(torch.ones(0, 3))
    with pytest.raises(ValueError, match="max_iterations is 0"):
        rpca(torch.ones(3, 3), max_iterations=0)
    with pytest.raises(ValueError, match="tolerance nan"):
        rpca(torch.ones(3, 3), tolerance=math.nan)
