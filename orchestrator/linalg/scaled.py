"""Low-rank factors of a weight with scaled inputs, with their loss on the calibration inputs.

Shape suffixes: O outputs, I inputs, K = min(O, I), R rank.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import (
    InputGram,
    LowRank,
    OutputGram,
    Statistic,
    decompose,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledLowRank(LowRank):
    """Factors that are optimal in the norm of a scale, measured in the norm of a statistic too."""

    activation_R: Tensor
    """Energy explained by each direction, u^T (W H W^T) u, of `activation_total`; float64, in the
    order of the factors, so not sorted."""
    activation_total: float
    """trace(W H W^T); the loss at rank r is this less the first r of `activation_R`."""


def decompose_scaled(
    weight_OI: Tensor, statistic: Statistic, rank: int, scale_I: Tensor
) -> ScaledLowRank:
    """Compute the factors, for every rank up to `rank`, that are closest to W after scaling the
    inputs by s.

    Minimises `|(W - W') diag(s)|` in the Frobenius norm, by the truncated SVD of `W diag(s)` and
    the division by s: `U_r Σ_r V_r^T diag(s)^-1 = U_r (U_r^T W)`, so no division is needed.
    Energies and total are those of `W diag(s)`. U holds the leading eigenvectors of `W diag(s²)
    W^T`; those below about 1e-7 of the largest singular value are determined by the weight alone,
    see `decompose`.

    The loss on the rows of the statistic is exact too: U is orthonormal, so the loss at rank r is
    `trace(W H W^T)` less the first r of `diag(U^T W H W^T U)`.

    Dtype and device as in `decompose`; the scale is float64 [I], above 0. O(O I K + K^3), plus O
    I^2 for the loss if the statistic is the Gram of the inputs.

    Raises:
        InputError: The weight, the scale or the statistic contains NaN or infinity.
        ValueError: The scale has another size than the inputs, or is not above 0.
    """
    outputs, inputs = weight_OI.shape
    if scale_I.shape != (inputs,) or not bool((scale_I > 0).logical_or(scale_I.isnan()).all()):
        raise ValueError(f"the scale is {tuple(scale_I.shape)}, not {inputs} numbers above 0")
    check_finite("weight", weight_OI)
    check_finite("scale of the inputs", scale_I)
    check_finite("statistic", _matrix(statistic))
    own: Statistic
    if outputs <= inputs:
        own = OutputGram(_outer(weight_OI.double() * scale_I))
    else:
        own = InputGram(scale_I.double().square().diag())
    return _measured(weight_OI, decompose(weight_OI, own, rank), statistic)


def decompose_in_order(
    weight_OI: Tensor, statistic: Statistic, rank: int, *, left_OK: Tensor, energies_K: Tensor
) -> ScaledLowRank:
    """Compute the factors, for every rank up to `rank`, of given directions in descending order of
    given energies.

    Directions with equal energies keep their order. Whatever it is, `W' = U_r (U_r^T W)` with U_r
    of the directions that are kept, all of them reproduce W, and losses of outputs and weight
    follow as in `decompose_scaled`. Energies and total say what a cut loses in the unit of
    `energies_K`.

    Dtype and device as in `decompose`. O(O I K).

    Args:
        left_OK: Orthonormal columns that span those of the weight, float64.
        energies_K: Not negative, float64.

    Raises:
        InputError: The weight, the energies or the statistic contains NaN or infinity.
    """
    check_finite("weight", weight_OI)
    check_finite("energies", energies_K)
    check_finite("statistic", _matrix(statistic))
    order_K = energies_K.argsort(descending=True, stable=True)
    left_OR = left_OK[:, order_K[:rank]]
    # of a tall weight it is a copy that no one else holds
    del left_OK
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OR, down_RI = left_OR.to(dtype).contiguous(), (left_OR.T @ weight_OI.double()).to(dtype)
    del left_OR
    result = LowRank(
        weight_OR=weight_OR,
        down_RI=down_RI,
        energies_K=energies_K[order_K],
        total=float(energies_K.sum()),
        report={
            "basis": "identity" if len(weight_OI) <= weight_OI.shape[1] else "householder",
            "known_rank": int(energies_K.count_nonzero()),
            "orthonormality": _orthonormality(weight_OR),
        },
    )
    return _measured(weight_OI, result, statistic)


def _orthonormality(weight_OR: Tensor) -> float:
    """Return the largest entry of |U^T U - 1|."""
    square_RR = weight_OR.T @ weight_OR
    square_RR.diagonal().sub_(1)
    return float(square_RR.abs().max())


def _measured(weight_OI: Tensor, result: LowRank, statistic: Statistic) -> ScaledLowRank:
    """Add the energies of the outputs to factors with orthonormal columns."""
    activation_R, activation_total = explained(weight_OI, result, statistic)
    return ScaledLowRank(
        **{field.name: getattr(result, field.name) for field in fields(result)},
        activation_R=activation_R,
        activation_total=activation_total,
    )


def _outer(rows_OI: Tensor) -> Tensor:
    return rows_OI @ rows_OI.T


def explained(weight_OI: Tensor, result: LowRank, statistic: Statistic) -> tuple[Tensor, float]:
    """Compute `diag(U^T W H W^T U)` and `trace(W H W^T)`, products and sums in float64."""
    if isinstance(statistic, InputGram):
        matrix, rows, whole = statistic.matrix_II.double(), result.down_RI, weight_OI
        total = torch.sum(whole.double() @ matrix * whole)
    else:
        matrix, rows = statistic.matrix_OO.double(), result.weight_OR.T
        total = matrix.trace()
    rows_R = rows.double()
    return torch.sum(rows_R @ matrix * rows_R, dim=1), float(total)


def _matrix(statistic: Statistic) -> Tensor:
    return statistic.matrix_II if isinstance(statistic, InputGram) else statistic.matrix_OO
