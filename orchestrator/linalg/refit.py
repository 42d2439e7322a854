"""Least-squares refit of left factors to inputs that changed after the decomposition.

Shape suffixes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor

from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gram import check_finite

EPS = torch.finfo(torch.float64).eps


def refit(
    weight_OI: Tensor,
    left_OR: Tensor,
    down_RI: Tensor,
    gram_II: Tensor,
    *,
    eigen: Eigensolver | None = None,
) -> Tensor:
    """Compute the left factor with the least output error on new inputs; the right factor is kept.

    Minimises `trace(E H E^T)` for `E = W - A D` over A, D = `down_RI` and H the second moment of
    the inputs, which are those of the compressed model:

        A = A0 + (W - A0 D) H D^T (D H D^T)^+

    with A0 = `left_OR`. In exact arithmetic A is independent of A0 if D H D^T is regular; along
    directions without input, below R eps of the largest eigenvalue, A0 is unchanged.

    Computed in float64; the result has the dtype of `left_OR`. All tensors are on one device. O(O
    I^2 + R^3).

    Args:
        eigen: Solver of the eigendecompositions; records fallback solvers.

    Raises:
        InputError: H contains NaN or infinity.

    References:
        The coefficient update of Basis Sharing (arXiv:2410.03765) and D-Rank (arXiv:2509.25622),
        and the least-squares update of SVD-LLM (arXiv:2403.07378, first version). Their code
        inverts D H D^T.
    """
    check_finite("input Gram", gram_II)
    down, gram, left = down_RI.double(), gram_II.double(), left_OR.double()
    image_IR = gram @ down.T
    values_R, vectors_RR = (eigen or Eigensolver()).decompose(down @ image_IR)
    known = values_R > len(values_R) * EPS * values_R[-1].clamp(min=0)
    scale_R = torch.where(known, 1 / values_R, 0.0)
    gap_OR = (weight_OI.double() - left @ down) @ image_IR
    step_OR: Tensor = ((gap_OR @ vectors_RR) * scale_R) @ vectors_RR.T
    return (left + step_OR).to(left_OR.dtype)
