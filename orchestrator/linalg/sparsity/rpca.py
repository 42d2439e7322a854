"""Robust PCA: a weight as a low-rank matrix plus a sparse one.

Shape suffixes: O outputs, I inputs, M = max(O, I), K = min(O, I), R rank, N nonzeros.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gram import add_upper_product, check_finite
from orchestrator.linalg.low_rank import Precision

Solver = Literal["ialm", "admm_fixed_mu"]
"""`ialm`, the default, is the inexact augmented Lagrangian of Lin et al. (arXiv:1009.5055).

mu grows by a factor 1.5 per iteration from 1.25 / |W|_2, with Y0 = W / max(|W|_2, |W|_inf /
lambda). Termination is guaranteed: |Y|_inf <= lambda, so the residual after k iterations is at most
1.6 sqrt(K) 1.5^(1 - k). Weights of SmolLM2-135M take 31 to 39 iterations. Because mu grows, the
result is near the minimum but not at it: for one weight 0.4 % above it, with 134 directions instead
of 113 and the same number of nonzeros.

`admm_fixed_mu` keeps mu = O I / (4 |W|_1) and starts from zeros, like the code published by the
first author of CAP. Its distance to the minimum depends on the number of iterations: choose it for
comparison with that code, or for the minimum itself. After 200 iterations the residual of a weight
is about 1e-5.
"""

NARROW_THRESHOLD = 1 / 16
"""Fraction of |W|_2 down to which float32 is precise enough for the threshold 1 / mu of a growing
mu.

The float32 error of L, in units of the threshold, grows with mu. Measured on seven linears of
SmolLM2-135M as the support that differs from `exact`: 1/16 (seven iterations) up to 3e-6 of the
entries, 1/50 up to 5e-5, 1/250 up to 1.5e-3. Nearly all of it is due to float32 eigenvectors.
"""

NARROW_RESIDUAL = 1e-4
"""Residual down to which float32 is precise enough; or 100 times the tolerance, if larger."""

DROPPED = 1e-8
"""Fraction of the largest singular value of L below which others count as rounding noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Schedule:
    """Growth of mu and stopping rule of a solver."""

    growth: float
    tolerance: float
    max_iterations: int


_SCHEDULES: dict[Solver, _Schedule] = {
    "ialm": _Schedule(growth=1.5, tolerance=1e-7, max_iterations=100),
    "admm_fixed_mu": _Schedule(growth=1.0, tolerance=1e-6, max_iterations=200),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustPCA:
    """`W = L + S` up to the residual: L as factors, S as its nonzero entries."""

    weight_OR: Tensor
    """U: left singular vectors of L, by descending singular value; `L = weight_OR @ down_RI`."""
    down_RI: Tensor
    """U^T L."""
    sigma_R: Tensor
    """Singular values of L, descending, float64."""
    values_N: Tensor
    """Nonzero entries of S."""
    positions_N: Tensor
    """Their positions in the flattened [O, I], int32, ascending."""
    report: dict[str, float | int | str]
    """Details of the computation and of the result:

    - `solver`, `precision`: as requested.
    - `iterations`, `narrow_iterations`: all iterations, and those in float32.
    - `residual`: |W - L - S|_F / |W|_F.
    - `converged`: True if the residual is within the tolerance.
    - `rank`, `nonzeros`, `density`: of L, of S, and of S over the number of entries.
    - `eigen`: fallback solvers used if the device's solver failed (`Eigensolver`).
    """


def rpca(
    weight_OI: Tensor,
    *,
    solver: Solver = "ialm",
    precision: Precision = "fast",
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> RobustPCA:
    """Split a weight so that `|L|_* + lambda |S|_1` is minimal subject to `W = L + S`.

    lambda = 1 / sqrt(max(O, I)), for which generic low-rank and sparse parts are recovered exactly
    (arXiv:0912.3599). An iteration, with t = 1 / mu, is

        L <- U max(sigma - t, 0) V^T,  U sigma V^T = W - S + t Y
        S <- Z - clip(Z, lambda t),    Z = W - L + t Y
        Y <- clip(Z, lambda t) / t     (= Y + mu (W - L - S))

    until |W - L - S|_F <= tolerance |W|_F. L is computed from the smaller Gram: with X = W - S + t
    Y transposed to have K columns and `X^T X = V sigma^2 V^T`, `L = X V max(1 - t / sigma, 0) V^T`,
    with only the R columns of sigma > t. An iteration costs M K^2 FLOPs for the triangle of the
    Gram, one `eigh` of order K, and the cheaper of 2 R K^2 + 2 M K^2 and 4 M K R for the products;
    memory is seven matrices of M K entries, 8 bytes each. The Gram determines a singular value to
    eps |X|_2^2 / sigma: 2 % of a threshold of 1e-7 |W|_2, the smallest that `ialm` reaches on real
    weights. Directions this close to the threshold may differ from those of an SVD.

    `exact` uses float64 throughout. `fast` starts in float32, which halves the time of an
    iteration, and switches to float64 when the residual or a growing mu requires it
    (`NARROW_RESIDUAL`, `NARROW_THRESHOLD`), at the latest in the last of `max_iterations`. With a
    growing mu rounding errors are never corrected, so the switch is early.

    The factors and values have the weight's dtype, at least float32, and its device. Bit-identical
    for equal inputs, device and number of threads. The transposed weight gives the transposed L and
    S (S to the bit if O and I differ), and scaling the weight by a power of two scales L and S
    exactly. Stops without an error after `max_iterations` (default: 100 for `ialm`, 200 for
    `admm_fixed_mu`); the default `tolerance` is 1e-7 and 1e-6, respectively.

    Raises:
        InputError: The weight contains NaN or infinity, or has more entries than 32 bits can count.

    References:
        Stage 1 of CAP, arXiv:2505.03801. It does not specify the schedule of mu, the stopping rule
        and the number of iterations; see `Solver` for the two choices. Departures: L before S
        (CAP's order, not Lin's) also in `ialm`; no upper limit for mu in `ialm`, where Lin's code
        has 1e7 mu0, which is not reached within 40 iterations.
    """
    defaults = _SCHEDULES[solver]
    schedule = _Schedule(
        growth=defaults.growth,
        tolerance=defaults.tolerance if tolerance is None else tolerance,
        max_iterations=defaults.max_iterations if max_iterations is None else max_iterations,
    )
    _check(weight_OI, schedule)
    transposed = weight_OI.shape[0] < weight_OI.shape[1]
    tall_MK = (weight_OI.T if transposed else weight_OI).double().contiguous()
    # A power of two near the largest entry: exact, and float32 can square the scaled entries.
    unit = 2.0 ** max(math.frexp(float(tall_MK.abs().max()))[1], -1000)
    state, report = _iterate(tall_MK / unit, solver, schedule, precision)
    report = {"solver": solver, "precision": precision, **report}
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    return _result(state, transposed=transposed, unit=unit, dtype=dtype, report=report)


class _State:
    """Unknowns of the iteration, in one dtype.

    Y is stored as Y / mu, and S as `rest - clipped`. This saves passes over memory: `rest` is the
    weight less L plus Y / mu, and clipping it gives the next Y / mu.
    """

    def __init__(self, weight_MK: Tensor, dual_MK: Tensor, eigen: Eigensolver):
        self.eigen = eigen
        self.weight_MK = weight_MK
        self.dual_MK = dual_MK
        """Y / mu."""
        self.target_MK = weight_MK + dual_MK
        """W - S + Y / mu, whose singular values are shrunk."""
        self.rest_MK = torch.zeros_like(weight_MK)
        """W - L + Y / mu, whose entries are shrunk."""
        self.clipped_MK = torch.zeros_like(weight_MK)
        self.vectors_KR = weight_MK.new_zeros(weight_MK.shape[1], 0)
        """Right singular vectors of L, by ascending singular value."""
        self.sigma_R = weight_MK.new_zeros(0)
        """Singular values of the target above the threshold, ascending."""
        self.threshold = 0.0

    def cast(self, weight_MK: Tensor, dtype: torch.dtype) -> "_State":
        """Return the state in another dtype, the weight from the original."""
        if self.weight_MK.dtype == dtype:
            return self
        state = _State(weight_MK.to(dtype), self.dual_MK.to(dtype), self.eigen)
        state.target_MK = self.target_MK.to(dtype)
        return state

    def step(self, threshold: float, bound: float) -> float:
        """Compute L, S and Y / mu from the target; returns |W - L - S|_F."""
        self.threshold = threshold
        self.vectors_KR, self.sigma_R = _above(self.target_MK, threshold, self.eigen)
        torch.add(self.weight_MK, self.dual_MK, out=self.rest_MK)
        (rows, columns), rank = self.target_MK.shape, len(self.sigma_R)
        scaled_KR = self.vectors_KR * (1 - threshold / self.sigma_R)
        if rank * (2 * rows - columns) < rows * columns:
            self.rest_MK.addmm_(self.target_MK @ scaled_KR, self.vectors_KR.T, alpha=-1)
        else:
            self.rest_MK.addmm_(self.target_MK, scaled_KR @ self.vectors_KR.T, alpha=-1)
        torch.clamp(self.rest_MK, -bound, bound, out=self.clipped_MK)
        return float(self.dual_MK.sub_(self.clipped_MK).norm())

    def advance(self, growth: float) -> None:
        """Compute the next target and Y / mu, for mu times `growth`."""
        torch.div(self.clipped_MK, growth, out=self.dual_MK)
        torch.sub(self.weight_MK, self.rest_MK, out=self.target_MK)
        self.target_MK.add_(self.clipped_MK, alpha=1 + 1 / growth)

    def low_rank(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `L V` [M, R], the singular values of L, descending, and V [K, R]."""
        shrunk_R = (self.sigma_R - self.threshold).flip(0)
        shrunk_R = shrunk_R[shrunk_R > DROPPED * shrunk_R[:1]]
        vectors_KR = self.vectors_KR.flip(1)[:, : len(shrunk_R)]
        part_R = shrunk_R / (shrunk_R + self.threshold)
        return self.target_MK @ (vectors_KR * part_R), shrunk_R, vectors_KR

    def sparse(self) -> Tensor:
        """S [M, K]."""
        return self.rest_MK - self.clipped_MK


def _result(
    state: _State,
    *,
    transposed: bool,
    unit: float,
    dtype: torch.dtype,
    report: dict[str, float | int | str],
) -> RobustPCA:
    """Convert the final state to factors and entries of the original weight."""
    image_MR, sigma_R, vectors_KR = state.low_rank()
    if transposed:
        left_OR, down_RI = vectors_KR, image_MR.T
    else:
        left_OR, core_RR = torch.linalg.qr(image_MR)
        sign_R = torch.where(core_RR.diagonal() < 0, -1.0, 1.0).to(core_RR)
        left_OR, down_RI = left_OR * sign_R, (sign_R[:, None] * core_RR) @ vectors_KR.T
    sparse_MK = state.sparse()
    flat = (sparse_MK.T if transposed else sparse_MK).flatten()
    positions_N = flat.nonzero().squeeze(1)
    return RobustPCA(
        weight_OR=left_OR.to(dtype).contiguous(),
        down_RI=(down_RI * unit).to(dtype).contiguous(),
        sigma_R=sigma_R * unit,
        values_N=(flat[positions_N] * unit).to(dtype),
        positions_N=positions_N.to(torch.int32),
        report=report
        | {
            "rank": len(sigma_R),
            "nonzeros": len(positions_N),
            "density": len(positions_N) / len(flat),
        },
    )


def _iterate(
    weight_MK: Tensor, solver: Solver, schedule: _Schedule, precision: Precision
) -> tuple[_State, dict[str, float | int | str]]:
    """Run the iteration; returns the final state, in float64, and the report."""
    size, eigen = float(weight_MK.norm()), Eigensolver()
    if size == 0:
        state = _State(weight_MK, torch.zeros_like(weight_MK), eigen)
        return state, {"iterations": 0, "narrow_iterations": 0, "residual": 0.0, "converged": True}
    sparsity = weight_MK.shape[0] ** -0.5  # lambda
    norm = _spectral_norm(weight_MK, eigen)
    if solver == "ialm":
        threshold = norm / 1.25
        dual_MK = weight_MK * (threshold / max(norm, float(weight_MK.abs().max()) / sparsity))
    else:
        threshold = 4 * float(weight_MK.abs().mean())
        dual_MK = torch.zeros_like(weight_MK)

    state, narrow_iterations, residual = _State(weight_MK, dual_MK, eigen), 0, math.inf
    for iteration in range(1, schedule.max_iterations + 1):
        narrow = (
            precision == "fast"
            and iteration == narrow_iterations + 1  # once float64, always float64
            and iteration < schedule.max_iterations
            and residual > max(NARROW_RESIDUAL, 100 * schedule.tolerance)
            and (schedule.growth == 1 or threshold > NARROW_THRESHOLD * norm)
        )
        narrow_iterations += narrow
        state = state.cast(weight_MK, torch.float32 if narrow else torch.float64)
        residual = state.step(threshold, sparsity * threshold) / size
        if residual <= schedule.tolerance and not narrow:
            break
        if iteration < schedule.max_iterations:
            state.advance(schedule.growth)
            threshold /= schedule.growth
    return state, {
        "iterations": iteration,
        "narrow_iterations": narrow_iterations,
        "residual": residual,
        "converged": residual <= schedule.tolerance,
        **eigen.report,
    }


def _above(matrix_MK: Tensor, threshold: float, eigen: Eigensolver) -> tuple[Tensor, Tensor]:
    """Return right singular vectors [K, R] and singular values above a threshold, ascending."""
    # LAPACK through torch: the upper triangle takes 0.9 of the time of the lower one.
    values_K, vectors_KK = eigen.decompose(_square(matrix_MK), upper=True)
    sigma_K = values_K.clamp_(min=0).sqrt_()
    first = len(sigma_K) - int((sigma_K > threshold).sum())
    return vectors_KK[:, first:], sigma_K[first:]


def _spectral_norm(matrix_MK: Tensor, eigen: Eigensolver) -> float:
    return math.sqrt(eigen.values(_square(matrix_MK), upper=True)[-1])


def _square(matrix_MK: Tensor) -> Tensor:
    """Compute the upper triangle of `X^T X` [K, K]."""
    square_KK = matrix_MK.new_zeros(matrix_MK.shape[1], matrix_MK.shape[1])
    add_upper_product(square_KK, matrix_MK, matrix_MK)
    return square_KK


def _check(weight_OI: Tensor, schedule: _Schedule) -> None:
    if weight_OI.ndim != 2 or not weight_OI.numel():
        raise ValueError(f"weight has shape {tuple(weight_OI.shape)}, not [outputs, inputs]")
    if schedule.max_iterations < 1 or not schedule.tolerance >= 0:
        raise ValueError(
            f"max_iterations is {schedule.max_iterations} and tolerance {schedule.tolerance}: "
            "at least 1 and at least 0 are needed"
        )
    largest = torch.iinfo(torch.int32).max
    if weight_OI.numel() > largest:
        raise InputError(
            f"weight has {weight_OI.numel()} entries, 32-bit positions count at most {largest}; "
            "exclude it from the targets"
        )
    check_finite("weight", weight_OI)
