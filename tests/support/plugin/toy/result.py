"""Numerics of the method. Shape suffixes: O outputs, I inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalResult:
    """Kept values, and energies of the outputs over the calibration tokens."""

    diagonal_O: Tensor
    total_O: Tensor
    """Energy of each output of the dense linear, float64."""
    kept_O: Tensor
    """Energy of each output of the diagonal one, float64."""
    lost: float
    """Energy of the difference of all outputs."""


def decompose_diagonal(weight_OI, gram_II, *, fit):
    """Keep one value per output; its least squares fit is (W H)[o, j] / H[j, j], j = o mod I."""
    rows_O = torch.arange(len(weight_OI), device=weight_OI.device)
    columns_O = rows_O % weight_OI.shape[1]
    gram_II = gram_II.double()
    product_OI = weight_OI.double() @ gram_II
    cross_O, square_O = product_OI[rows_O, columns_O], gram_II[columns_O, columns_O]
    diagonal_O = weight_OI[rows_O, columns_O]
    if fit:
        diagonal_O = (cross_O / square_O).to(weight_OI.dtype)
    kept = diagonal_O.double()
    total_O, kept_O = (product_OI * weight_OI).sum(dim=1), kept.square() * square_O
    lost = float((total_O - 2 * kept * cross_O + kept_O).sum())
    return DiagonalResult(diagonal_O, total_O, kept_O, lost)
