"""Product of two factors as pivot rows and linear combinations of them.

Shape suffixes: O outputs, I inputs, R rank, S = O - R.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite

BAND = 256
"""Number of rows of a product that are compared at a time."""
BOUND = 1.1
"""Upper bound of the magnitude of the coefficients.

Measured on weights of SmolLM2-135M at keep 0.6 and 0.9: elimination alone gives up to 2.7, and 15
exchanges per weight reduce this to 1.1. Rounded to bfloat16, the product then has 2.4 times the
error of two rounded factors, and 3.1 times without exchanges; rounded to float32, the error is at
most 1.5e-7 of its norm.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pivoted:
    """Product as R pivot rows, and the other rows as combinations of the pivots."""

    weight_SR: Tensor
    """Coefficients of the other rows in terms of the pivots; rows and columns in the order of the
    product's rows."""
    down_RI: Tensor
    """The pivots: unchanged rows of the product."""
    order_O: Tensor
    """Index of each output of the product in [pivots, others]; int64."""
    report: dict[str, float | int]
    """Cost and measured error:

    - `exchanges`: number of pivots exchanged after elimination.
    - `largest`: the largest entry of |weight_SR|.
    - `error`: |A D - rebuilt| / |A D| in the Frobenius norm, of the tensors as they are returned.
    """


def pivot(weight_OR: Tensor, down_RI: Tensor) -> Pivoted:
    """Store the product A D, A = `weight_OR`, in R (O + I) - R^2 values instead of R (O + I).

    With P the pivots and N the other rows,

        (A D)_P = A_P D,    (A D)_N = C (A D)_P,    C = A_N A_P^-1,

    This is exact. C depends only on the span of the columns, so it is computed from the Q of A = Q
    T, whose pivots are independent for any rank of A. Gaussian elimination with partial pivoting
    selects P; then the pivot and the other row of the largest entry of C are exchanged, until no
    entry is above `BOUND`. Each exchange multiplies |det Q_P| by that entry, so the loop ends. The
    rounding of stored pivots is amplified by at most `BOUND` in the other rows.

    Computed in float64; the results have the dtypes and the common device of the factors. O(O R^2 +
    O R I), plus O R for each exchange. Bit-identical for equal inputs, device and number of
    threads.

    Raises:
        ValueError: The shapes do not match, or R is not below O.
        InputError: A factor contains NaN or infinity.

    References:
        PIFA, arXiv:2501.19090, which selects P by a QR decomposition of the product's rows with
        column pivoting, and C by least squares. The exchanges are those of maximum-volume
        submatrices (Goreinov et al., How to find a good submatrix, 2010).
    """
    outputs, rank = weight_OR.shape
    if not 1 <= rank < outputs or len(down_RI) != rank:
        raise ValueError(
            f"factors are {tuple(weight_OR.shape)} and {tuple(down_RI.shape)}; they need one rank, "
            f"in 1 to {outputs - 1}, one less than the outputs"
        )
    check_finite("left factor", weight_OR)
    check_finite("right factor", down_RI)
    basis_OR, _ = torch.linalg.qr(weight_OR.double())
    rows, exchanges = _choose(basis_OR)
    pivots_R, others_S = (_on(weight_OR, sorted(part)) for part in (rows[:rank], rows[rank:]))
    coefficients_SR = _solve(basis_OR[pivots_R], basis_OR[others_S])
    del basis_OR
    order_O = torch.cat([pivots_R, others_S]).argsort()
    kept_RI = weight_OR[pivots_R].double() @ down_RI.double()
    weight_SR, rows_RI = coefficients_SR.to(weight_OR.dtype), kept_RI.to(down_RI.dtype)
    return Pivoted(
        weight_SR=weight_SR,
        down_RI=rows_RI,
        order_O=order_O,
        report={
            "exchanges": exchanges,
            "largest": float(coefficients_SR.abs().max()),
            "error": _error(weight_OR, down_RI, weight_SR, rows_RI, pivots=sorted(rows[:rank])),
        },
    )


def _on(tensor: Tensor, places: Sequence[int] | Tensor) -> Tensor:
    """Copy indices known to the host to the device of a tensor."""
    return torch.as_tensor(places, dtype=torch.int64).to(tensor.device, non_blocking=True)


def _choose(basis_OR: Tensor) -> tuple[list[int], int]:
    """Return all rows, pivots first, and the number of exchanges.

    The host reads one number and its position for each exchange.
    """
    outputs, rank = basis_OR.shape
    _, swaps_R = torch.linalg.lu_factor(basis_OR)
    rows = list(range(outputs))
    for place, other in enumerate(swaps_R.tolist()):
        rows[place], rows[other - 1] = rows[other - 1], rows[place]
    pivots_RR, others_SR = (basis_OR[_on(basis_OR, part)] for part in (rows[:rank], rows[rank:]))
    coefficients_SR = _solve(pivots_RR, others_SR)
    sizes_SR, exchanges = torch.empty_like(coefficients_SR), 0
    while True:
        flat = torch.abs(coefficients_SR, out=sizes_SR).argmax()
        # a position below 2^53 is exact in float64
        size, where = torch.stack([sizes_SR.view(-1).take(flat), flat.double()]).tolist()
        if not size > BOUND:
            return rows, exchanges
        other, place = divmod(int(where), rank)
        entry = coefficients_SR[other, place].clone()
        # the other row replaces the pivot: one elimination step on the coefficients
        column_S, row_R = coefficients_SR[:, place].clone(), coefficients_SR[other].clone()
        column_S[other] -= 1
        row_R[place] += 1
        coefficients_SR.addr_(column_S, row_R / entry, alpha=-1)
        rows[place], rows[rank + other] = rows[rank + other], rows[place]
        exchanges += 1


def _solve(pivots_RR: Tensor, others_SR: Tensor) -> Tensor:
    """Solve C Q_P = Q_N for C."""
    coefficients_SR: Tensor = torch.linalg.solve(pivots_RR, others_SR, left=False)
    return coefficients_SR


def _error(
    weight_OR: Tensor,
    down_RI: Tensor,
    weight_SR: Tensor,
    rows_RI: Tensor,
    *,
    pivots: Sequence[int],
) -> float:
    """Compute the relative error of the product in bands of rows, to save memory; reads the device
    once."""
    full_RI, kept_RI = down_RI.double(), rows_RI.double()
    is_pivot_O = torch.zeros(len(weight_OR), dtype=torch.bool)
    is_pivot_O[torch.tensor(pivots)] = True
    sums = torch.zeros(2, dtype=torch.float64, device=weight_OR.device)
    seen = [0, 0]  # pivots and other rows of earlier bands
    for start in range(0, len(weight_OR), BAND):
        gap_BI = weight_OR[start : start + BAND].double() @ full_RI
        norm = gap_BI.square().sum()
        is_pivot_B = is_pivot_O[start : start + BAND]
        pivots_B, others_B = (each.nonzero().squeeze(1) for each in (is_pivot_B, ~is_pivot_B))
        kept, made = (slice(n, n + len(b)) for n, b in zip(seen, (pivots_B, others_B), strict=True))
        gap_BI[_on(gap_BI, pivots_B)] -= kept_RI[kept]
        gap_BI[_on(gap_BI, others_B)] -= weight_SR[made].double() @ kept_RI
        seen = [kept.stop, made.stop]
        sums += torch.stack([norm, gap_BI.square().sum()])
    total, lost = sums.tolist()
    return math.sqrt(lost / total) if total else math.sqrt(lost)
