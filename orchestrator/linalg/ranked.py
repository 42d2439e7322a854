"""A low-rank plus a sparse part of one weight, ordered by what each piece is worth.

Shape suffixes: O outputs, I inputs, R rank, N nonzeros, B buckets, S columns of a sketch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import InputGram
from orchestrator.linalg.rpca import RobustPCA

Utility = Literal["activation", "magnitude"]
SKETCH = 128
"""Columns of the inputs' sketch. An error estimated with it is off by a standard deviation of
sqrt(2 / SKETCH) = 12 % of an error of rank one, and by 1 / sqrt(r) of that where it spreads evenly
over r directions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedParts:
    """Directions and entries of a weight, each kind by descending utility.

    The utility of a piece is the energy it gives the outputs over the values it stores:
    `d H d^T / (O + I)` for a direction, d its row of `down_RI`, and `S_ij^2 H_jj` for an entry.
    """

    weight_OR: Tensor
    """Orthonormal columns; `weight_OR @ down_RI` is the low-rank part."""
    down_RI: Tensor
    values_N: Tensor
    """Nonzero entries of the sparse part, float32."""
    positions_N: Tensor
    """Where each stands, row I + column, int32."""
    direction_utilities_R: Tensor
    """float64, like all that follow but the counts."""
    direction_magnitudes_R: Tensor
    """Singular values of the low-rank part."""
    bucket_counts_B: Tensor
    """Entries of each bucket in their order, int64: equal ones, the last one's may be fewer."""
    bucket_utilities_B: Tensor
    """Mean over the bucket's entries."""
    bucket_magnitudes_B: Tensor
    """Mean |S_ij| over the bucket's entries."""
    energy: float
    """`trace(W H W^T)`, what the utilities are parts of, though not disjoint ones: the low-rank
    and the sparse part of a robust PCA overlap."""
    sketch_IS: Tensor
    """Random combinations of the inputs, float32: `|D sketch|^2` estimates `trace(D H D^T)` of any
    D without bias, which says what a choice loses when H is long gone."""
    report: dict[str, float | int | str]
    """Of the robust PCA."""


def rank_parts(
    weight_OI: Tensor, parts: RobustPCA, statistic: InputGram, utility: Utility, buckets: int
) -> RankedParts:
    """The parts of a robust PCA by descending utility; `magnitude` takes H = 1.

    Ties keep the order of the parts: descending singular values, ascending positions. Entries are
    summed up in `buckets` buckets of equal count, one for each of them where `buckets` is 0. A
    low-rank part of rank 0 becomes one direction of zeros: every linear has one to keep.

    On the weight's device. R I^2 multiply-adds in float64 for the directions, N log N for the
    entries.

    Raises:
        InputError: The Gram holds NaN or infinity.
    """
    outputs, inputs = weight_OI.shape
    matrix_II = statistic.matrix_II.double()
    check_finite("input Gram", matrix_II)
    sketch_IS = _sketch(matrix_II)
    if utility == "magnitude":
        matrix_II = torch.eye(inputs, dtype=torch.float64, device=weight_OI.device)
    missing = 1 if not len(parts.sigma_R) else 0
    down_RI = pad(parts.down_RI, (0, 0, 0, missing))
    worth_R = _energies(down_RI, matrix_II) / (outputs + inputs)
    order_R = worth_R.argsort(descending=True, stable=True)
    magnitude_N = parts.values_N.double().abs()
    square_N = matrix_II.diagonal().clamp(min=0)[parts.positions_N.long() % inputs]
    worth_N = magnitude_N.square() * square_N
    order_N = worth_N.argsort(descending=True, stable=True)
    size = -(-len(order_N) // buckets) if buckets else 1
    counts_B = _bucket_sums(torch.ones_like(worth_N), size)
    return RankedParts(
        weight_OR=pad(parts.weight_OR, (0, missing))[:, order_R],
        down_RI=down_RI[order_R],
        values_N=parts.values_N[order_N].float(),
        positions_N=parts.positions_N[order_N],
        direction_utilities_R=worth_R[order_R],
        direction_magnitudes_R=pad(parts.sigma_R.double(), (0, missing))[order_R],
        bucket_counts_B=counts_B.long(),
        bucket_utilities_B=_bucket_sums(worth_N[order_N], size) / counts_B,
        bucket_magnitudes_B=_bucket_sums(magnitude_N[order_N], size) / counts_B,
        energy=float(_energies(weight_OI, matrix_II).sum()),
        sketch_IS=sketch_IS,
        report=parts.report,
    )


def _energies(rows_RI: Tensor, matrix_II: Tensor) -> Tensor:
    """`d H d^T` of every row, float64 [R]; rounding below zero counts as zero."""
    rows_RI = rows_RI.double()
    return (rows_RI @ matrix_II * rows_RI).sum(dim=1).clamp(min=0)


def _sketch(matrix_II: Tensor) -> Tensor:
    """H^(1/2) times fixed random signs over sqrt(SKETCH): its outer product has the mean H."""
    generator = torch.Generator().manual_seed(0)
    sign_IS = torch.randint(2, (len(matrix_II), SKETCH), generator=generator).double() * 2 - 1
    values_I, vectors_II = torch.linalg.eigh(matrix_II)
    root_II = vectors_II * values_I.clamp(min=0).sqrt()
    sketch_IS: Tensor = root_II @ sign_IS.to(matrix_II.device) / SKETCH**0.5
    return sketch_IS.float()


def _bucket_sums(value_N: Tensor, size: int) -> Tensor:
    """Sums over consecutive pieces of `size`, the last one what is left, [B]."""
    if not len(value_N):
        return value_N
    buckets = -(-len(value_N) // size)
    return pad(value_N, (0, buckets * size - len(value_N))).view(buckets, size).sum(dim=1)
