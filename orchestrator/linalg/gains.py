"""Gains of kept directions: the factors that lower a cut's loss most, in closed form.

Shape suffixes: O outputs, I inputs, K kept directions.
"""

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite


def closed_gains(
    left_OK: Tensor,
    right_KI: Tensor,
    lost_OI: Tensor,
    *,
    gram_II: Tensor,
    curvature_OO: Tensor | None = None,
) -> Tensor:
    """Compute the gains g with the least loss trace(C E H Eᵀ) of U diag(g) D.

    E = W - U diag(g) D, where the cut has lost L = W - U D. The loss is quadratic in g; with

        M_ij = (u_iᵀ C u_j)(D_i H D_jᵀ),    b_i = u_iᵀ C L H D_iᵀ

    its minimiser is g = 1 + M⁻¹ b. If L consists of other directions U' D', b_i is the sum of M_ij
    over them. A cut of directions that are orthogonal on either side therefore has gains of 1: for
    C = 1 and any H that of orthonormal U, as of every SVD; for any C that of rows of D which are
    orthogonal in the norm of H, as of `svd_llm` and `two_sided` on the inputs that they were
    computed for. Gains differ from 1 if C counts and H is not that of the decomposition, or is not
    part of it (`svd`, `asvd`). A direction without loss (M_ii = 0) has gain 1.

    SoCo (arXiv 2502.15092) trains gains above 1; this closed form for one linear is ours.

    Args:
        gram_II: H, any positive semidefinite matrix.
        curvature_OO: C, the same; None: the identity.

    Returns:
        [K], float64, on the device of the factors. O(K² (O + I) + K O I + O I² + K³), and O² K with
        C; float64 copies of the arguments.

    Raises:
        InputError: An argument contains NaN or infinity.
    """
    for name, tensor in (("left", left_OK), ("right", right_KI), ("lost", lost_OI)):
        check_finite(name, tensor)
    left_OK, right_KI, gram_II = left_OK.double(), right_KI.double(), gram_II.double()
    dual_OK = left_OK if curvature_OO is None else curvature_OO.double() @ left_OK
    mapped_KI = right_KI @ gram_II
    moment_KK = (left_OK.T @ dual_OK) * (right_KI @ mapped_KI.T)
    lost_K = ((dual_OK.T @ lost_OI.double()) * mapped_KI).sum(dim=1)
    # with a diagonal of ones, so that directions of little energy are not taken for noise
    scale_K = moment_KK.diagonal().clamp(min=0).rsqrt()
    scale_K = torch.where(scale_K.isfinite(), scale_K, 0)
    scaled_KK = scale_K[:, None] * moment_KK * scale_K
    inverse_KK = torch.linalg.pinv((scaled_KK + scaled_KK.T) / 2, rtol=1e-12, hermitian=True)
    gains_K: Tensor = 1 + scale_K * (inverse_KK @ (scale_K * lost_K))
    return gains_K
