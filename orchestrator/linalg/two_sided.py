"""Low-rank factors of one weight, best in the norm of its inputs and of the loss at its outputs.

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
    """Factors that are best for the loss, measured on outputs and on the weight too.

    The columns of `weight_OR` are orthonormal in the curvature's norm, not in the plain one.
    """

    weight_R: Tensor
    """What each direction explains of |W|² in the Frobenius norm, float64; some may be negative."""


def decompose_two_sided(
    weight_OI: Tensor, statistic: Statistic, rank: int, *, damping: float
) -> TwoSidedLowRank:
    """The factors, of every rank up to `rank`, that raise the loss least to second order.

    For D = W − W', H the second moment of the inputs x and C that of the loss gradients g by the
    outputs, with x and g independent (K-FAC), all tokens together lose about ½ trace(C D H Dᵀ).
    With C = L Lᵀ the minimum over rank r is `W' = L⁻ᵀ U (Uᵀ Lᵀ W)`, U the leading left singular
    vectors of `Lᵀ W H^(1/2)`; the minimum is half the sum of the squared singular values cut, the
    energies here. H is never inverted. C is damped: `damping` times the mean of its diagonal is
    added to the diagonal, so that what the gradients did not see is not free.

    Everything happens in the weight's column space, on [K, K] matrices: with W = Q S, Q [O, K]
    orthonormal, C enters as Qᵀ C Q, which is S⁻ᵀ (Wᵀ C W) S⁻¹ where O > I, so that neither a
    Gram of the wide side nor its inverse is needed. Where H has rank below K the remaining
    directions go by the weight, as in `decompose`.

    Columns of `weight_OR` are scaled so that the damped C has mean 1 on its diagonal. A weight
    whose gradients are all zero has no energy, and factors in the order that inputs alone give.

    Dtype and device as in `decompose`. O(O I² + K³), three times the K³ of `decompose`.

    Raises:
        InputError: The weight or a statistic holds NaN or infinity; the curvature is no second
            moment.
        ValueError: The statistic has no curvature, or one of another size.

    References:
        IO-SVD (arXiv 2605.15626) and OBD-LLM (2604.00821) whiten both sides, as K-FAC
        (1503.05671) approximates the Fisher information. Formulas derived here.
    """
    if statistic.curvature is None:
        raise ValueError("two-sided factors need the curvature beside the Gram")
    check_finite("weight", weight_OI)
    # of a 70B model each of these matrices is 0.5 to 1.9 GB, so none outlives its last use
    basis, basis_OK, core_KI = column_space(weight_OI.double().contiguous(), "fast")
    moment_KK = _symmetric(second_moment(basis_OK, core_KI, statistic))
    eigen = Eigensolver()
    lower_KK, scale = _factor(_reduced(statistic.curvature, basis, core_KI), damping, eigen)

    values_K, vectors_KK = eigen.decompose(lower_KK.T @ moment_KK @ lower_KK, upper=True)
    energies_K, vectors_KK = values_K.flip(0), vectors_KK.flip(1)
    known = count_known(energies_K, statistic.tokens)
    energies_K[known:] = 0
    if known < rank:
        vectors_KK = complete(vectors_KK, known, lower_KK.T @ core_KI, eigen)
    total = float(torch.sum(lower_KK * (moment_KK @ lower_KK)))

    # the projection is the product of these two, `left right^T`, of rank r from their first columns
    left_KR = solve_triangular(lower_KK.T, vectors_KK[:, :rank], upper=True)
    right_KR = lower_KK @ vectors_KK[:, :rank]
    del vectors_KK
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OR = (left_KR if basis_OK is None else basis_OK @ left_KR).to(dtype).contiguous()
    down_RI = (right_KR.T @ core_KI).to(dtype)

    # the loss of factors as they are rounded: in the curvature's norm, within the column space
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
    """The symmetric matrix with this upper triangle; the lower one is not read."""
    check_finite("Gram", upper_KK.triu())
    return upper_KK.triu() + upper_KK.triu(1).T


def _reduced(curvature: Curvature, basis: str, core_KI: Tensor) -> Tensor:
    """Q^T C Q [K, K], C the mean over gradients."""
    size = len(core_KI)
    if curvature.matrix_KK.shape != (size, size):
        found = tuple(curvature.matrix_KK.shape)
        raise ValueError(f"curvature is {found}, the weight needs {(size, size)}")
    mean_KK = curvature.matrix_KK.double() / max(curvature.gradients, 1)
    check_finite("curvature", mean_KK)
    if bool((mean_KK.diagonal() < 0).any()):
        raise InputError(
            "curvature is no second moment: its diagonal has negative entries; calibrate again"
        )
    if basis == "identity":
        return mean_KK
    if basis == "cholesky":
        half_KK = solve_triangular(core_KI.T, mean_KK, upper=False)
        mean_KK = solve_triangular(core_KI.T, half_KK.T, upper=False)
    else:
        # columns may depend on each other; what W has no part in, W^T C W says nothing of
        inverse_KK = torch.linalg.pinv(core_KI)
        mean_KK = inverse_KK.T @ mean_KK @ inverse_KK
    symmetric_KK: Tensor = (mean_KK + mean_KK.T) / 2
    return symmetric_KK


def _factor(curvature_KK: Tensor, damping: float, eigen: Eigensolver) -> tuple[Tensor, float]:
    """L of the damped curvature, its mean diagonal 1, and what that mean was.

    Where the curvature is zero nothing is ever lost, and L is the identity.
    """
    eye_KK = torch.eye(len(curvature_KK), dtype=torch.float64, device=curvature_KK.device)
    scale = float(curvature_KK.diagonal().mean())
    if scale <= 0:
        return eye_KK, 0.0
    damped_KK = (curvature_KK / scale + damping * eye_KK) / (1 + damping)
    lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
    if int(info):
        # nearly dependent columns of W blow up the rounding of W^T C W, perhaps below zero
        values_K, vectors_KK = eigen.decompose(curvature_KK / scale)
        nearest_KK = (vectors_KK * values_K.clamp(min=0)) @ vectors_KK.T
        lower_KK = torch.linalg.cholesky((nearest_KK + damping * eye_KK) / (1 + damping))
    return lower_KK, scale * (1 + damping)


def _explained(left_KR: Tensor, right_KR: Tensor, moment_KK: Tensor) -> Tensor:
    """What each direction takes off `trace((1 − P_r) M (1 − P_r)^T)` for P_r = left_r right_r^T.

    The projections are oblique, so a direction's part depends on those before it.
    """
    image_KR = moment_KK @ right_KR
    cross_RR = (left_KR.T @ left_KR) * (right_KR.T @ image_KR)
    before_R = cross_RR.tril(-1).sum(dim=1)
    explained_R: Tensor = 2 * torch.sum(left_KR * image_KR, dim=0) - cross_RR.diagonal()
    return explained_R - 2 * before_R
