"""Factors for the inputs that a compressed model makes, in the place of the dense model's.

At one site x is what the dense model reads for a token and z what the compressed one reads, which
the blocks and linears before have changed; d = x - z is the drift.

Shape suffixes: T tokens, O outputs, I inputs, R rank.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from orchestrator.linalg.gram import FLUSH_TOKENS, Gram, check_finite
from orchestrator.linalg.low_rank import InputGram, decompose

Basis = Literal["kept", "new"]
"""Whether the columns of a left factor stay, or both factors are found again."""

LARGEST_RESIDUAL = 1e-8
"""Of a solve that is used, relative to its right side; sound ones in float64 leave 1e-12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Second moments of what two models read at one site, float64, on one device."""

    moment_II: Tensor
    """H = sum z z^T."""
    cross_II: Tensor
    """E = sum d z^T."""
    spread_II: Tensor
    """D = sum d d^T."""
    tokens: int


class DriftGram:
    """Running second moments of z and d over the tokens that it has seen.

    Sums as `Gram` does, float32 products flushed into float64 every `FLUSH_TOKENS` tokens, so the
    bits are a function of the sequence of updates alone. d is taken before it is multiplied: where
    two models read nearly the same, the difference of two Grams would be their rounding. Where only
    z is given d is zero and takes no work. Holds 32 n^2 bytes, and `drift` 24 more; 4.4 n^2 FLOPs a
    token.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self._moment, self._spread = Gram(n, device), Gram(n, device)
        self._sum_II = torch.zeros(n, n, dtype=torch.float64, device=device)

    def update(self, rows_TI: Tensor, dense_TI: Tensor | None = None) -> Self:
        """Adds the tokens' rows z and x, of any floating dtype: those inside the mask alone.

        Raises:
            ValueError: The shapes do not fit.
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

    def drift(self) -> Drift:
        """What has been seen.

        Raises:
            InputError: A row held NaN or infinity.
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
    """What z has to be multiplied with to stand for the target input; one for a site's linears."""

    matrix_II: Tensor | None
    """M, float64; nothing if the solve did not pass its check."""
    report: dict[str, float | str]
    """`condition` of H + lambda in the 1-norm and relative `residual`, of a solve; `trouble` if it
    did not pass."""


def input_map(drift: Drift, beta: float, damping: float) -> InputMap:
    """M that brings M z nearest to the target t = (1 - beta) z + beta x, for all linears at once.

    `M = argmin sum |t - M z|^2 + lambda |M - 1|^2 = 1 + beta E (H + lambda)^-1`, lambda `damping`
    times the mean diagonal of H. That is `((1 - beta) H + beta C + lambda) (H + lambda)^-1` with
    the cross moment C = sum x z^T. Where there is no data, or no drift, it is the identity. Every
    row w of a weight has its least-squares w M: no row's error rises from w to w M.

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
    # the widest matrices of a model: no more of them at a time than it takes
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
    """`sum |W t - V z|^2` over the tokens, for W = `weight_OI` and V = `found_OI`.

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
    """A weight as `left_OR @ down_RI`, plus entries that stay as they are."""

    left_OR: Tensor
    down_RI: Tensor
    rest_OI: Tensor | None = None

    def product(self) -> Tensor:
        """The weight [O, I], float64."""
        product_OI = self.left_OR.double() @ self.down_RI.double()
        return product_OI if self.rest_OI is None else product_OI + self.rest_OI.double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensated:
    """The factors to use, and what was measured on them."""

    factors: Factors
    taken: bool
    """Whether they are new; else they are those that were given."""
    report: dict[str, float | str | bool]
    """`before` and `after`: `sum |W t - W' z|^2` over `sum |W t|^2`, of the factors given and of
    those to use; `rejected` beside it where what was found was not taken; what `InputMap` says."""


def compensate(
    weight_OI: Tensor, factors: Factors, drift: Drift, turn: InputMap, beta: float, basis: Basis
) -> Compensated:
    """Factors of the same rank whose outputs on z come nearer to the dense weight's on the target.

    With M of `input_map` the target is `W t = W M z` plus what no function of z can give.

    `kept`: `down M`. Let the left factor be U, and `|v|_S^2 = v^T S v` any norm of the outputs in
    which U^T S U = 1. The best right factor for U is `U^T S W M`, and that is `down M` wherever
    `down = U^T S W` as truncation leaves it, plain (S = 1) or two-sided (S the curvature). So S is
    not needed, and the outputs that the loss hears most stay the kept ones. Pivoted rows are such
    factors too, so the pivots and the combinations stay. Entries beside the factors stay, and are
    not made up for.

    `new`: both factors of `W M`, less the entries, as `decompose` truncates it in the norm of H:
    the minimum of `sum |W t - W' z|^2` over the rank, up to what the ridge keeps back. What the
    method knew of the outputs is lost.

    What is found is taken only if it is finite and lowers the error that it minimises: that of
    `new` over the outputs, that of `kept` over the rows of `down`, which is the error of the
    outputs in any norm S as above, but for a constant.

    Float64; new factors in the dtype of those given, on their device, as the statistics must be.
    O(O I^2), and for `new` the cost of `decompose`.

    References:
        The theorem behind `new` is AA-SVD's (arXiv:2604.02119, 3.2), whose code takes an inverse
        Cholesky factor of H. SAES-SVD (arXiv:2602.03051) minimises `|W z - W' z|^2 + alpha
        |W x - W' z|^2`, which has the target above for beta = alpha / (1 + alpha): it truncates
        `W (H + beta E) H^(-1/2)`, with alpha between 0.25 and 0.75, so beta between 0.2 and 0.43,
        found for each linear in closed form; here one beta is given for all. `kept` is derived
        here.
    """
    total = modelled_error(weight_OI, torch.zeros_like(weight_OI), drift, beta) or 1.0

    def error(found: Factors) -> float:
        return modelled_error(weight_OI, found.product(), drift, beta) / total

    before = error(factors)
    report: dict[str, float | str | bool] = {"taken": False, "before": before, "after": before}
    report |= turn.report
    if turn.matrix_II is None:
        return Compensated(factors=factors, taken=False, report=report)
    if basis == "kept":
        down_RI = (factors.down_RI.double() @ turn.matrix_II).to(factors.down_RI.dtype)
        found = Factors(left_OR=factors.left_OR, down_RI=down_RI, rest_OI=factors.rest_OI)
        old = modelled_error(factors.down_RI, factors.down_RI, drift, beta)
        is_lower = modelled_error(factors.down_RI, down_RI, drift, beta) < old
    else:
        found, elsewhere = _truncate(weight_OI, factors, drift, turn.matrix_II)
        report |= elsewhere
        is_lower = error(found) < before
    after = error(found)
    if not (is_lower and bool(found.product().isfinite().all())):
        return Compensated(factors=factors, taken=False, report=report | {"rejected": after})
    report |= {"taken": True, "after": after}
    return Compensated(factors=found, taken=True, report=report)


def _truncate(
    weight_OI: Tensor, factors: Factors, drift: Drift, turn_II: Tensor
) -> tuple[Factors, dict[str, str]]:
    """The best factors of `W M` less the entries, in the norm of H, and `eigen` if it is known."""
    target_OI = weight_OI.double() @ turn_II
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
