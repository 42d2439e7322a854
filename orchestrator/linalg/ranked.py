"""Low-rank and sparse parts of one weight, ordered by utility.

Shape suffixes: O outputs, I inputs, R rank, N nonzeros, B buckets, S columns of a sketch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from orchestrator.errors import InputError
from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import InputGram
from orchestrator.linalg.sparsity.rpca import RobustPCA

Utility = Literal["activation", "magnitude"]
SKETCH = 128
"""Columns of the sketch of the inputs. The standard deviation of an error estimated with it is
sqrt(2 / SKETCH) = 12 % for an error of rank one, and 1 / sqrt(r) of that for an error spread evenly
over r directions."""
RIDGES = (0.0, *(10.0**power for power in range(-7, 1)))
"""Fractions of the diagonal to add to a Gram, tried in order, until its Cholesky factorization
succeeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedParts:
    """Singular directions and sparse entries of a weight, each by descending utility.

    The utility of a candidate is its output energy over its stored values: `d H d^T / (O + I)` for
    a direction, d its row of `down_RI`, and `S_ij^2 H_jj` for an entry.
    """

    weight_OR: Tensor
    """Orthonormal columns; `weight_OR @ down_RI` is the low-rank part."""
    down_RI: Tensor
    values_N: Tensor
    """Nonzero entries of the sparse part, float32."""
    positions_N: Tensor
    """Positions, row I + column, int32."""
    direction_utilities_R: Tensor
    """float64, as all fields below except the counts."""
    direction_magnitudes_R: Tensor
    """Singular values of the low-rank part."""
    bucket_counts_B: Tensor
    """Number of entries per bucket, in order, int64; equal, except that the last may be smaller."""
    bucket_utilities_B: Tensor
    """Mean over the entries of the bucket."""
    bucket_magnitudes_B: Tensor
    """Mean |S_ij| over the entries of the bucket."""
    energy: float
    """`trace(W H W^T)`. The utilities do not add up to it: the low-rank and the sparse part of a
    robust PCA overlap."""
    sketch_IS: Tensor
    """Random combinations of the inputs, float32; see `sketched_energy`."""
    ridge_I: Tensor
    """Ridge of each input that the sketch includes in addition to H, float32."""
    report: dict[str, float | int | str]
    """Report of the robust PCA, and `ridge`, the fraction of its diagonal added to H for the
    sketch."""


def rank_parts(
    weight_OI: Tensor, parts: RobustPCA, statistic: InputGram, *, utility: Utility, buckets: int
) -> RankedParts:
    """Sort the parts of a robust PCA by descending utility; `magnitude` uses H = 1.

    Ties keep the order of the parts: descending singular values, ascending positions. Entries are
    summarised in `buckets` buckets of equal count, or in one bucket per entry if `buckets` is 0. A
    low-rank part of rank 0 is replaced by one zero direction, so that every linear has a direction
    to keep.

    Computed on the weight's device in float64: (R + O + SKETCH) I^2 multiply-adds, one Cholesky
    factorization of H (I^3 / 3 FLOPs), a few if H is singular, and N log N for the entries.

    Raises:
        InputError: The Gram contains NaN or infinity, or is not positive semidefinite.
    """
    outputs, inputs = weight_OI.shape
    matrix_II = statistic.matrix_II.double()
    check_finite("input Gram", matrix_II)
    sketch_IS, ridge_I, ridge = _sketch(matrix_II)
    if utility == "magnitude":
        matrix_II = torch.eye(inputs, dtype=torch.float64, device=weight_OI.device)
    padding = 1 if not len(parts.sigma_R) else 0
    down_RI = pad(parts.down_RI, (0, 0, 0, padding))
    worth_R = _energies(down_RI, matrix_II) / (outputs + inputs)
    order_R = worth_R.argsort(descending=True, stable=True)
    magnitude_N = parts.values_N.double().abs()
    square_N = matrix_II.diagonal().clamp(min=0)[parts.positions_N.long() % inputs]
    worth_N = magnitude_N.square() * square_N
    order_N = worth_N.argsort(descending=True, stable=True)
    size = -(-len(order_N) // buckets) if buckets else 1
    counts_B = _bucket_sums(torch.ones_like(worth_N), size)
    return RankedParts(
        weight_OR=pad(parts.weight_OR, (0, padding))[:, order_R],
        down_RI=down_RI[order_R],
        values_N=parts.values_N[order_N].float(),
        positions_N=parts.positions_N[order_N],
        direction_utilities_R=worth_R[order_R],
        direction_magnitudes_R=pad(parts.sigma_R.double(), (0, padding))[order_R],
        bucket_counts_B=counts_B.long(),
        bucket_utilities_B=_bucket_sums(worth_N[order_N], size) / counts_B,
        bucket_magnitudes_B=_bucket_sums(magnitude_N[order_N], size) / counts_B,
        energy=float(_energies(weight_OI, matrix_II).sum()),
        sketch_IS=sketch_IS,
        ridge_I=ridge_I,
        report=parts.report | {"ridge": ridge},
    )


def _energies(rows_RI: Tensor, matrix_II: Tensor) -> Tensor:
    """Compute `d H d^T` of every row, float64 [R]; negative rounding errors are set to zero."""
    rows_RI = rows_RI.double()
    return (rows_RI @ matrix_II * rows_RI).sum(dim=1).clamp(min=0)


def sketched_energy(change_OI: Tensor, sketch_IS: Tensor, ridge_I: Tensor) -> float:
    """Estimate `trace(D H D^T)` for any D = `change_OI`, without bias and without H.

        |D sketch|^2 - sum_ij D_ij^2 ridge_j

    Products are in the dtype of D, sums in float64; negative estimates are set to 0.
    """
    whole = torch.sum((change_OI @ sketch_IS).double().square())
    beside = torch.sum(change_OI.double().square() @ ridge_I.double())
    return max(float(whole - beside), 0.0)


def _sketch(matrix_II: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the sketch, the ridge of each input included in it, and e, the ridge over the diagonal
    of H.

    With diag(d) = diag(H)^(1/2) and the Cholesky factor d^-1 H d^-1 + e = L L^T, the sketch is `d
    L` times fixed random signs over sqrt(SKETCH): its outer product has the mean `H + e diag(H)`,
    whose second term is known. The error of float32 products of inputs is relative to d_i d_j, so e
    need only be slightly above that relative error, even if one channel dominates H.
    """
    generator = torch.Generator().manual_seed(0)
    sign_IS = torch.randint(2, (len(matrix_II), SKETCH), generator=generator).double() * 2 - 1
    square_I = matrix_II.diagonal().clamp(min=0)
    root_I = square_I.sqrt()
    inverse_I = torch.where(root_I > 0, 1 / root_I, 0.0)
    scaled_II = (matrix_II * inverse_I[:, None]).mul_(inverse_I)
    for ridge in RIDGES:
        scaled_II.diagonal().fill_(1 + ridge)
        lower_II, info = torch.linalg.cholesky_ex(scaled_II)
        if not int(info):
            sketch_IS = root_I[:, None] * (lower_II @ sign_IS.to(matrix_II.device)) / SKETCH**0.5
            return sketch_IS.float(), (ridge * square_I).float(), ridge
    raise InputError(
        "input Gram is not a second moment: it has large negative eigenvalues; calibrate again"
    )


def _bucket_sums(value_N: Tensor, size: int) -> Tensor:
    """Sum consecutive groups of `size` values, the last one possibly smaller, [B]."""
    if not len(value_N):
        return value_N
    buckets = -(-len(value_N) // size)
    return pad(value_N, (0, buckets * size - len(value_N))).view(buckets, size).sum(dim=1)
