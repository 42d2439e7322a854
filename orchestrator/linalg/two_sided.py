"""Low-rank factors of one weight, optimal in the norms of its inputs and of the loss at its
outputs.

Shape suffixes: O outputs, I inputs, K = min(O, I), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from orchestrator.errors import InputError
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import (
    Curvature,
    Statistic,
    column_space,
    complete,
    count_known,
    second_moment,
)
from orchestrator.linalg.scaled import ScaledLowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedLowRank(ScaledLowRank):
    """Factors that are optimal for the loss, measured on the outputs and on the weight too.

    The columns of `weight_OR` are orthonormal in the norm of the curvature, not in the Euclidean
    norm.
    """

    weight_R: Tensor
    """Part of |W|² in the Frobenius norm explained by each direction, float64; may be negative."""


def decompose_two_sided(
    weight_OI: Tensor, statistic: Statistic, rank: int, *, damping: float
) -> TwoSidedLowRank:
    """Compute the factors, for every rank up to `rank`, with the least second-order increase of the
    loss.

    Let D = W − W', H the second moment of the inputs x and C that of the loss gradients g with
    respect to the outputs, with x and g independent (K-FAC). The loss over all tokens then
    increases by about ½ trace(C D H Dᵀ). With C = L Lᵀ the minimiser of rank r is `W' = L⁻ᵀ U (Uᵀ
    Lᵀ W)`, U the leading left singular vectors of `Lᵀ W H^(1/2)`; the minimum is half the sum of
    the truncated squared singular values, the energies here. H is never inverted. C is damped:
    `damping` times the mean of its diagonal is added to the diagonal, so that directions without
    gradients have a cost.

    The computation is in the weight's column space, on [K, K] matrices: with W = Q S, Q [O, K]
    orthonormal, C is used as Qᵀ C Q, which is S⁻ᵀ (Wᵀ C W) S⁻¹ if O > I. Neither a Gram of the wide
    side nor its inverse is needed. If H has rank below K, the weight determines the remaining
    directions, as in `decompose`.

    Columns of `weight_OR` are scaled so that the diagonal of the damped C has mean 1. A weight
    whose gradients are all zero has no energy; its factors are ordered by the inputs alone.

    Dtype and device as in `decompose`. O(O I² + K³), with three times the K³ term of `decompose`.

    Raises:
        InputError: The weight or a statistic contains NaN or infinity; the curvature is not a
            second moment.
        ValueError: The statistic has no curvature, or its size does not match.

    References:
        IO-SVD (arXiv 2605.15626) and OBD-LLM (2604.00821) whiten both sides, as K-FAC (1503.05671)
        approximates the Fisher information. Formulas derived here.
    """
    if statistic.curvature is None:
        raise ValueError(
            "two-sided factors need a curvature in addition to the Gram; the statistic has none"
        )
    check_finite("weight", weight_OI)
    return _compute(weight_OI, statistic, statistic.curvature, rank, damping=damping)


def _compute(
    weight_OI: Tensor, statistic: Statistic, curvature: Curvature, rank: int, *, damping: float
) -> TwoSidedLowRank:
    """Compute the factors, with measurements on the result."""
    # for a 70B model each of these matrices is 0.5 to 1.9 GB: free each after its last use
    basis, basis_OK, core_KI = column_space(weight_OI.double().contiguous(), "fast")
    moment_KK = _symmetric(second_moment(basis_OK, core_KI, statistic))
    eigen = Eigensolver()
    lower_KK, scale = _factor(_reduced(curvature, basis, core_KI), damping, eigen)

    values_K, vectors_KK = eigen.decompose(lower_KK.T @ moment_KK @ lower_KK, upper=True)
    energies_K, vectors_KK = values_K.flip(0), vectors_KK.flip(1)
    known = count_known(energies_K, statistic.tokens)
    energies_K[known:] = 0
    if known < rank:
        vectors_KK = complete(vectors_KK, known, lower_KK.T @ core_KI, eigen)
    total = float(torch.sum(lower_KK * (moment_KK @ lower_KK)))

    # the projection is the product `left right^T`, of rank r from the first r columns
    left_KR = solve_triangular(lower_KK.T, vectors_KK[:, :rank], upper=True)
    right_KR = lower_KK @ vectors_KK[:, :rank]
    del vectors_KK
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OR = (left_KR if basis_OK is None else basis_OK @ left_KR).to(dtype).contiguous()
    down_RI = (right_KR.T @ core_KI).to(dtype)

    # loss of the rounded factors, in the norm of the curvature, within the column space
    rounded_KR = weight_OR.double() if basis_OK is None else basis_OK.T @ weight_OR.double()
    del basis_OK
    image_KR, kept_KR = lower_KK.T @ rounded_KR, right_KR.to(dtype).double()
    del rounded_KR
    lost = total - 2 * torch.sum(image_KR * (lower_KK.T @ moment_KK @ kept_KR))
    lost += torch.sum((image_KR.T @ image_KR) * (kept_KR.T @ moment_KK @ kept_KR))
    del image_KR, kept_KR, lower_KK
    predicted = total - float(energies_K[:rank].sum())
    return TwoSidedLowRank(
        weight_OR=weight_OR,
        down_RI=down_RI,
        energies_K=energies_K * scale,
        total=total * scale,
        activation_R=_explained(left_KR, right_KR, moment_KK),
        activation_total=float(moment_KK.trace()),
        weight_R=_explained(left_KR, right_KR, core_KI @ core_KI.T),
        report={
            "basis": basis,
            "known_rank": known,
            "curvature": scale,
            "deviation": abs(float(lost) - predicted) / total if total > 0 else abs(float(lost)),
            **eigen.report,
        },
    )


def _symmetric(upper_KK: Tensor) -> Tensor:
    """Rebuild the symmetric matrix from its upper triangle; the lower one is not read."""
    check_finite("Gram", upper_KK.triu())
    return upper_KK.triu() + upper_KK.triu(1).T


def _reduced(curvature: Curvature, basis: str, core_KI: Tensor) -> Tensor:
    """Compute Q^T C Q [K, K], C the mean over gradients."""
    size = len(core_KI)
    if curvature.matrix_KK.shape != (size, size):
        found = tuple(curvature.matrix_KK.shape)
        raise ValueError(f"curvature is {found}, the weight needs {(size, size)}")
    mean_KK = curvature.matrix_KK.double() / max(curvature.gradients, 1)
    check_finite("curvature", mean_KK)
    if bool((mean_KK.diagonal() < 0).any()):
        raise InputError(
            "curvature is not a second moment: its diagonal has negative entries; calibrate again"
        )
    if basis == "identity":
        return mean_KK
    if basis == "cholesky":
        half_KK = solve_triangular(core_KI.T, mean_KK, upper=False)
        mean_KK = solve_triangular(core_KI.T, half_KK.T, upper=False)
    else:
        # columns may be dependent; W^T C W has no information outside the row space of W
        inverse_KK = torch.linalg.pinv(core_KI)
        mean_KK = inverse_KK.T @ mean_KK @ inverse_KK
    symmetric_KK: Tensor = (mean_KK + mean_KK.T) / 2
    return symmetric_KK


def _factor(curvature_KK: Tensor, damping: float, eigen: Eigensolver) -> tuple[Tensor, float]:
    """Return L of the damped curvature, scaled to mean diagonal 1, and the mean before scaling.

    If the curvature is zero, L is the identity and the mean 0.
    """
    eye_KK = torch.eye(len(curvature_KK), dtype=torch.float64, device=curvature_KK.device)
    scale = float(curvature_KK.diagonal().mean())
    if scale <= 0:
        return eye_KK, 0.0
    damped_KK = (curvature_KK / scale + damping * eye_KK) / (1 + damping)
    lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
    if int(info):
        # nearly dependent columns of W amplify the rounding of W^T C W, possibly below zero
        values_K, vectors_KK = eigen.decompose(curvature_KK / scale)
        nearest_KK = (vectors_KK * values_K.clamp(min=0)) @ vectors_KK.T
        lower_KK = torch.linalg.cholesky((nearest_KK + damping * eye_KK) / (1 + damping))
    return lower_KK, scale * (1 + damping)


def _explained(left_KR: Tensor, right_KR: Tensor, moment_KK: Tensor) -> Tensor:
    """Compute by how much each direction reduces `trace((1 − P_r) M (1 − P_r)^T)`, P_r = left_r
    right_r^T.

    The projections are oblique, so the reduction of a direction depends on the earlier ones.
    """
    image_KR = moment_KK @ right_KR
    cross_RR = (left_KR.T @ left_KR) * (right_KR.T @ image_KR)
    before_R = cross_RR.tril(-1).sum(dim=1)
    explained_R: Tensor = 2 * torch.sum(left_KR * image_KR, dim=0) - cross_RR.diagonal()
    return explained_R - 2 * before_R
