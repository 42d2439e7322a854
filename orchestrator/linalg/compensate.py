"""Refit factors to the inputs of the compressed model instead of those of the dense model.

At one site, x is the input of the dense model for a token and z that of the compressed model,
changed by the compression of earlier blocks and linears; d = x - z is the drift.

Shape suffixes: T tokens, O outputs, I inputs, R rank.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from orchestrator.linalg.gram import FLUSH_TOKENS, Gram, check_finite
from orchestrator.linalg.low_rank import InputGram, decompose

Basis = Literal["kept", "new"]
"""`kept`: the columns of the left factor stay; `new`: both factors are recomputed."""

LARGEST_RESIDUAL = 1e-8
"""Upper bound of the relative residual of a solve that is used; typical float64 solves reach 1e-12.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Second moments of the inputs of two models at one site, float64, on one device."""

    moment_II: Tensor
    """H = sum z z^T."""
    cross_II: Tensor
    """E = sum d z^T."""
    spread_II: Tensor
    """D = sum d d^T."""
    tokens: int


class DriftGram:
    """Running second moments of z and d over tokens.

    Sums as `Gram` does, float32 products flushed into float64 every `FLUSH_TOKENS` tokens, so the
    bits are a function of the sequence of updates alone. d is computed before the products: for
    nearly equal inputs the difference of two Grams would be dominated by rounding. If only z is
    given, d is zero and has no cost. Memory: 32 n^2 bytes, plus 24 n^2 for the result of `drift`;
    4.4 n^2 FLOPs a token.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self._moment, self._spread = Gram(n, device), Gram(n, device)
        self._sum_II = torch.zeros(n, n, dtype=torch.float64, device=device)

    def update(self, rows_TI: Tensor, dense_TI: Tensor | None = None) -> Self:
        """Add the rows z and x of the tokens selected by the mask, in any floating dtype.

        Raises:
            ValueError: The shapes of the two differ.
        """
        self._moment.update(rows_TI)
        if dense_TI is None:
            return self
        if dense_TI.shape != rows_TI.shape:
            found, wanted = tuple(dense_TI.shape), tuple(rows_TI.shape)
            raise ValueError(f"the dense model's rows are {found}, the others {wanted}")
        rows_TI = rows_TI.float()
        gap_TI = dense_TI.float() - rows_TI
        self._spread.update(gap_TI)
        for start in range(0, len(gap_TI), FLUSH_TOKENS):
            piece = slice(start, start + FLUSH_TOKENS)
            self._sum_II += gap_TI[piece].T @ rows_TI[piece]
        return self

    @property
    def tokens(self) -> int:
        """Number of rows added so far."""
        return self._moment.tokens

    def drift(self) -> Drift:
        """Return the accumulated moments.

        Raises:
            InputError: A row contained NaN or infinity.
        """
        check_finite(f"cross moment of {self._moment.tokens} tokens", self._sum_II)
        return Drift(
            moment_II=self._moment.matrix(),
            cross_II=self._sum_II.clone(),
            spread_II=self._spread.matrix(),
            tokens=self._moment.tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InputMap:
    """Map M from z to the target input; shared by all linears of a site."""

    matrix_II: Tensor | None
    """M, float64; None if the solve failed its check."""
    report: dict[str, float | str]
    """Solve: `condition` of H + lambda in the 1-norm and relative `residual`; `trouble` if the
    solve failed its check."""


def input_map(drift: Drift, beta: float, damping: float) -> InputMap:
    """Compute M so that M z is closest to the target t = (1 - beta) z + beta x, for all linears at
    once.

    `M = argmin sum |t - M z|^2 + lambda |M - 1|^2 = 1 + beta E (H + lambda)^-1`, lambda `damping`
    times the mean diagonal of H. That is `((1 - beta) H + beta C + lambda) (H + lambda)^-1` with
    the cross moment C = sum x z^T. Without data or without drift, M is the identity. For each row w
    of a weight, w M is the least-squares solution, so its error is not larger than that of w.

    By Cholesky in float64 on the statistics' device. 4 I^3.
    """
    moment_II, size = drift.moment_II, len(drift.moment_II)
    if beta == 0:
        eye_II = torch.eye(size, dtype=moment_II.dtype, device=moment_II.device)
        return InputMap(matrix_II=eye_II, report={})
    damped_II = moment_II.clone()
    damped_II.diagonal().add_(damping * moment_II.diagonal().mean())
    lower_II, info = torch.linalg.cholesky_ex(damped_II)
    if int(info):
        return InputMap(matrix_II=None, report={"trouble": "singular"})
    one_norm = torch.linalg.matrix_norm
    inverse_II = torch.cholesky_inverse(lower_II)
    condition = float(one_norm(damped_II, 1) * one_norm(inverse_II, 1))
    # these are the largest matrices of a model: keep as few as possible alive
    del inverse_II
    right_II = beta * drift.cross_II.T
    step_II = torch.cholesky_solve(right_II, lower_II)
    del lower_II
    norm = float(torch.linalg.norm(right_II))
    gap = float(torch.linalg.norm(right_II.addmm_(damped_II, step_II, alpha=-1)))
    residual = gap / norm if norm else gap
    report: dict[str, float | str] = {"condition": condition, "residual": residual}
    if not residual <= LARGEST_RESIDUAL:
        return InputMap(matrix_II=None, report=report | {"trouble": "residual"})
    step_II.diagonal().add_(1)
    return InputMap(matrix_II=step_II.T, report=report)


def modelled_error(weight_OI: Tensor, found_OI: Tensor, drift: Drift, beta: float) -> float:
    """Compute `sum |W t - V z|^2` over the tokens, for W = `weight_OI` and V = `found_OI`.

    With G = W - V it is `tr(G H G^T) + 2 beta tr(G E^T W^T) + beta^2 tr(W D W^T)`. Float64.
    O(O I^2).
    """
    weight_OI, gap_OI = weight_OI.double(), weight_OI.double() - found_OI.double()
    error = torch.sum(gap_OI * (gap_OI @ drift.moment_II))
    if beta:
        error += 2 * beta * torch.sum(gap_OI * (weight_OI @ drift.cross_II))
        error += beta**2 * torch.sum(weight_OI * (weight_OI @ drift.spread_II))
    return float(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Weight as `left_OR @ down_RI`, plus entries that are left unchanged."""

    left_OR: Tensor
    down_RI: Tensor
    rest_OI: Tensor | None = None

    def product(self) -> Tensor:
        """Return the weight [O, I], float64."""
        product_OI = self.left_OR.double() @ self.down_RI.double()
        return product_OI if self.rest_OI is None else product_OI + self.rest_OI.double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensated:
    """Factors to use, with measured errors."""

    factors: Factors
    taken: bool
    """True if `factors` are new, False if they are the given ones."""
    report: dict[str, float | str | bool]
    """`before` and `after`: `sum |W t - W' z|^2` over `sum |W t|^2`, of the given factors and of
    those to use; `rejected`: the error of new factors that were not used; plus the report of
    `InputMap`."""


def compensate(
    weight_OI: Tensor,
    factors: Factors,
    drift: Drift,
    mapped: InputMap,
    *,
    beta: float,
    basis: Basis,
) -> Compensated:
    """Compute factors of the same rank with outputs on z closer to the target outputs W t.

    With M of `input_map` the target is `W t = W M z` plus a part that is not a function of z.

    `kept`: `down M`. Let the left factor be U, and `|v|_S^2 = v^T S v` any norm of the outputs in
    which U^T S U = 1. The best right factor for U is `U^T S W M`. This equals `down M` if `down =
    U^T S W`, as for a truncated weight, plain (S = 1) or two-sided (S the curvature). Therefore S
    is not needed, and the output directions that matter most to the loss are preserved. It also
    holds for pivoted factors, so pivots and combinations are preserved. Sparse entries beside the
    factors are left unchanged and not compensated.

    `new`: both factors of `W M` less the entries, truncated by `decompose` in the norm of H. This
    minimises `sum |W t - W' z|^2` at this rank, up to the ridge, and loses the output weighting.

    The result is used only if it is finite and lowers the error that it minimises: for `new` the
    error of the outputs; for `kept` the error of the rows of `down`, which equals the error of the
    outputs in any norm S as above, up to a constant.

    Computed in float64; dtype and device as given. O(O I^2), plus `decompose` for `new`.

    References:
        The theorem behind `new` is AA-SVD's (arXiv:2604.02119, 3.2), whose code uses an inverse
        Cholesky factor of H. SAES-SVD (arXiv:2602.03051) minimises `|W z - W' z|^2 + alpha |W x -
        W' z|^2`, which has the target above with beta = alpha / (1 + alpha). It truncates `W (H +
        beta E) H^(-1/2)`, with alpha from 0.25 to 0.75, beta from 0.2 to 0.43, in closed form per
        linear; here beta is one given value for all linears. `kept` is derived here.
    """
    total = modelled_error(weight_OI, torch.zeros_like(weight_OI), drift, beta) or 1.0

    def error(found: Factors) -> float:
        return modelled_error(weight_OI, found.product(), drift, beta) / total

    before = error(factors)
    report: dict[str, float | str | bool] = {"taken": False, "before": before, "after": before}
    report |= mapped.report
    if mapped.matrix_II is None:
        return Compensated(factors=factors, taken=False, report=report)
    if basis == "kept":
        down_RI = (factors.down_RI.double() @ mapped.matrix_II).to(factors.down_RI.dtype)
        found = Factors(left_OR=factors.left_OR, down_RI=down_RI, rest_OI=factors.rest_OI)
        old = modelled_error(factors.down_RI, factors.down_RI, drift, beta)
        is_lower = modelled_error(factors.down_RI, down_RI, drift, beta) < old
    else:
        found, elsewhere = _truncate(weight_OI, factors, drift, mapped.matrix_II)
        report |= elsewhere
        is_lower = error(found) < before
    after = error(found)
    if not (is_lower and bool(found.product().isfinite().all())):
        return Compensated(factors=factors, taken=False, report=report | {"rejected": after})
    report |= {"taken": True, "after": after}
    return Compensated(factors=found, taken=True, report=report)


def _truncate(
    weight_OI: Tensor, factors: Factors, drift: Drift, map_II: Tensor
) -> tuple[Factors, dict[str, str]]:
    """Compute the best factors of `W M` less the entries in the norm of H, and their report."""
    target_OI = weight_OI.double() @ map_II
    if factors.rest_OI is not None:
        target_OI -= factors.rest_OI.double()
    rank = factors.down_RI.shape[0]
    best = decompose(target_OI, InputGram(drift.moment_II, drift.tokens), rank)
    found = Factors(
        left_OR=best.weight_OR.to(factors.left_OR.dtype),
        down_RI=best.down_RI.to(factors.down_RI.dtype),
        rest_OI=factors.rest_OI,
    )
    return found, {"eigen": str(best.report["eigen"])} if "eigen" in best.report else {}
