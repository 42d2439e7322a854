"""Joint least-squares fit of the values of kept sparse entries.

Shape suffixes: O outputs, I inputs, N entries or channels, P pairs of different channels, F
channels following a channel, H half of the channels, C channels counted cyclically, B a band of
rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BAND_ENTRIES = 2**20
"""Entries of a second moment that are packed at a time: 8 MB in float64, which fits a cache."""


def fit_entries(
    rest_OI: Tensor, positions_N: Tensor, curvature_OO: Tensor, moment_II: Tensor, *, steps: int
) -> Tensor:
    """Compute the corrections [N] of the entries of a sparse weight that lower its loss.

    Minimises `trace(C (D - V) H (D - V)^T)` over matrices V that are zero outside the positions,
    where D = `rest_OI` is the weight less its kept part. A step needs only the gradient C (D - V) H
    at the positions. The solver is conjugate gradients, preconditioned with the diagonal `C_ii
    H_jj`; no step raises the loss. A few steps are best, since late directions are those with
    little calibration data. If C or H is not positive semidefinite, for example by rounding, the
    iteration stops early.

    Computed in the dtype of `rest_OI`, at least float32, on its device; deterministic. A step costs
    2 O I (O + I) FLOPs; memory is six times the weight.

    With C = 1 and enough steps the result is the reconstruction that SparseGPT (arXiv:2301.00774)
    approximates column by column; C couples the rows.
    """
    dtype = torch.promote_types(rest_OI.dtype, torch.float32)
    curvature_OO, moment_II = curvature_OO.to(dtype), moment_II.to(dtype)
    is_kept_OI = torch.zeros_like(rest_OI, dtype=dtype)
    is_kept_OI.view(-1)[positions_N] = 1
    scale_OI = curvature_OO.diagonal()[:, None] * moment_II.diagonal()
    # entries without input or without effect on the loss stay as they are
    weight_OI = torch.where(scale_OI > 0, is_kept_OI / scale_OI, 0.0)

    gap_OI = (curvature_OO @ (rest_OI.to(dtype) @ moment_II)) * is_kept_OI
    found_OI = torch.zeros_like(gap_OI)
    step_OI = weight_OI * gap_OI
    size = torch.sum(gap_OI * step_OI)
    for _ in range(steps):
        image_OI = (curvature_OO @ (step_OI @ moment_II)) * is_kept_OI
        curvature = torch.sum(step_OI * image_OI)
        if not (float(size) > 0 and float(curvature) > 0):
            break
        found_OI += (size / curvature) * step_OI
        gap_OI -= (size / curvature) * image_OI
        scaled_OI = weight_OI * gap_OI
        before, size = size, torch.sum(gap_OI * scaled_OI)
        step_OI = scaled_OI + (size / before) * step_OI
    return found_OI.view(-1)[positions_N]


def correlations(matrix_NN: Tensor) -> Tensor:
    """Pack the off-diagonal part of a second moment, `M_ij / sqrt(M_ii M_jj)`, each pair once;
    float16.

    Row i holds the (N - 1) // 2 channels that follow i cyclically, so that all rows have one length
    and are copied in bands. If N is even, the pairs (i, i + N / 2) come last. Together with the
    diagonal of M this determines M, in a quarter of the bytes of float32. Shape [N (N - 1) / 2].
    """
    size = len(matrix_NN)
    root_N = matrix_NN.diagonal().clamp(min=0).sqrt()
    inverse_N = torch.where(root_N > 0, 1 / root_N, 0.0)
    found_P = torch.empty(size * (size - 1) // 2, dtype=torch.float16, device=matrix_NN.device)
    rows_NF, opposite_H = _parts(found_P, size)
    reach = rows_NF.shape[1]
    circle_C = torch.cat([inverse_N, inverse_N[:reach]])
    for band in _bands(size) if reach else ():
        wide_BC = torch.cat([matrix_NN[band], matrix_NN[band, :reach]], dim=1)
        scale_BF = circle_C.unfold(0, reach, 1)[band.start + 1 : band.stop + 1]
        values_BF = _following(wide_BC, band, reach) * inverse_N[band, None] * scale_BF
        rows_NF[band] = values_BF.clamp_(-1, 1)
    half = len(opposite_H)
    scale_H = inverse_N[:half] * inverse_N[size - half :]
    opposite_H.copy_((matrix_NN.diagonal(size // 2)[:half] * scale_H).clamp_(-1, 1))
    return found_P


def second_moment_of(root_N: Tensor, correlations_P: Tensor) -> Tensor:
    """Rebuild M, float32 [N, N], from the square root of its diagonal and its correlations."""
    size = len(root_N)
    rows_NF, opposite_H = _parts(correlations_P, size)
    reach = rows_NF.shape[1]
    matrix_NN = torch.zeros(size, size, device=root_N.device)
    for band in _bands(size) if reach else ():
        wide_BC = torch.zeros(band.stop - band.start, size + reach, device=root_N.device)
        _following(wide_BC, band, reach).copy_(rows_NF[band])
        matrix_NN[band] = wide_BC[:, :size]
        matrix_NN[band, :reach] += wide_BC[:, size:]
    matrix_NN.diagonal(size // 2)[: len(opposite_H)] += opposite_H
    matrix_NN += matrix_NN.T.clone()
    matrix_NN.fill_diagonal_(1)
    return matrix_NN * (root_N[:, None] * root_N)


def _parts(pairs_P: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split the pairs into rows of following channels and the pairs of opposite channels; views."""
    reach = max(size - 1, 0) // 2
    return pairs_P[: size * reach].view(size, reach), pairs_P[size * reach :]


def _bands(size: int) -> Iterator[slice]:
    """Yield bands of rows of a square matrix with `BAND_ENTRIES` entries each."""
    rows = max(1, BAND_ENTRIES // size)
    return (slice(start, min(start + rows, size)) for start in range(0, size, rows))


def _following(wide_BC: Tensor, band: slice, reach: int) -> Tensor:
    """View the entries after the diagonal in each row of a band, whose first columns are repeated
    at its end."""
    stride = wide_BC.stride(0)
    return wide_BC.as_strided((len(wide_BC), reach), (stride + 1, 1), band.start + 1)
