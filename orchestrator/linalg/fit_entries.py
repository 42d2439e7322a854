"""The values of kept entries, fitted together where they stand.

Shape suffixes: O outputs, I inputs, N entries, P pairs of different rows.
"""

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor


def fit_entries(
    rest_OI: Tensor, positions_N: Tensor, curvature_OO: Tensor, moment_II: Tensor, steps: int
) -> Tensor:
    """What to add to the entries of a sparse weight so that less is lost; [N].

    Minimises `trace(C (D - V) H (D - V)^T)` over V that is zero outside the positions, D =
    `rest_OI` being the weight less all that is kept of it. The gradient C (D - V) H at the
    positions is all that a step needs; by conjugate gradients, preconditioned with the diagonal
    `C_ii H_jj`, no step raises the loss. A few are best: the last directions are those that the
    calibration text hardly saw. Where C or H is no second moment, by rounding say, it ends early.

    In the dtype of `rest_OI`, float32 at least, on its device; deterministic. A step takes
    2 O I (O + I) FLOPs and holds six times the weight.

    With C = 1 and all steps it is the reconstruction that SparseGPT (arXiv:2301.00774) approaches
    column by column; C makes rows help each other.
    """
    dtype = torch.promote_types(rest_OI.dtype, torch.float32)
    curvature_OO, moment_II = curvature_OO.to(dtype), moment_II.to(dtype)
    is_kept_OI = torch.zeros_like(rest_OI, dtype=dtype)
    is_kept_OI.view(-1)[positions_N] = 1
    scale_OI = curvature_OO.diagonal()[:, None] * moment_II.diagonal()
    # what no input reaches, or no loss feels, stays as it is
    weight_OI = torch.where(scale_OI > 0, is_kept_OI / scale_OI, 0.0)

    gap_OI = (curvature_OO @ (rest_OI.to(dtype) @ moment_II)) * is_kept_OI
    found_OI = torch.zeros_like(gap_OI)
    step_OI = weight_OI * gap_OI
    size = torch.sum(gap_OI * step_OI)
    for _ in range(steps):
        image_OI = (curvature_OO @ (step_OI @ moment_II)) * is_kept_OI
        bend = torch.sum(step_OI * image_OI)
        if not (float(size) > 0 and float(bend) > 0):
            break
        found_OI += (size / bend) * step_OI
        gap_OI -= (size / bend) * image_OI
        turned_OI = weight_OI * gap_OI
        before, size = size, torch.sum(gap_OI * turned_OI)
        step_OI = turned_OI + (size / before) * step_OI
    return found_OI.view(-1)[positions_N]


def correlations(matrix_NN: Tensor) -> Tensor:
    """A second moment less its diagonal: `M_ij / sqrt(M_ii M_jj)`, i < j, row by row; float16.

    A quarter of the bytes of float32, and with M's diagonal all there is to know. [N (N - 1) / 2].
    """
    root_N = matrix_NN.diagonal().clamp(min=0).sqrt()
    inverse_N = torch.where(root_N > 0, 1 / root_N, 0.0)
    size = len(matrix_NN)
    found_P = torch.empty(size * (size - 1) // 2, dtype=torch.float16, device=matrix_NN.device)
    for row, rest_P in enumerate(_rows(found_P, size)):
        rest_P[:] = (matrix_NN[row, row + 1 :] * inverse_N[row] * inverse_N[row + 1 :]).clamp(-1, 1)
    return found_P


def _rows(upper_P: Tensor, size: int) -> Iterator[Tensor]:
    """What stands right of the diagonal, row by row; views."""
    starts = accumulate(range(size - 1, 0, -1), initial=0)
    return (upper_P[start : start + size - 1 - row] for row, start in enumerate(starts))


def second_moment_of(root_N: Tensor, correlations_P: Tensor) -> Tensor:
    """M of its diagonal's root and its correlations; float32 [N, N]."""
    size = len(root_N)
    matrix_NN = torch.zeros(size, size, device=root_N.device)
    for row, rest_P in enumerate(_rows(correlations_P, size)):
        matrix_NN[row, row + 1 :] = rest_P
    matrix_NN += matrix_NN.T.clone()
    matrix_NN.fill_diagonal_(1)
    return matrix_NN * (root_N[:, None] * root_N)
