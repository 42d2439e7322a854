"""Low-rank factors of one weight, optimal in the norm induced by its calibration inputs.

Shape suffixes: O outputs, I inputs, K = min(O, I), R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gradients import DirectionGradients, WeightGradient
from orchestrator.linalg.gram import add_upper_product, check_finite

Precision = Literal["exact", "fast"]
"""`exact` works in float64, with Householder reflections, and rounds the finished factors.

`fast`, the default, computes Q from a Cholesky factor of W^T W, multiplies Q, Y and S (see
`decompose`) in the dtype of the factors, and repeats the computation as `exact` if the measured
error of the result is out of bounds. Eigenvectors are float64 in both: in float32 they would add up
to 8 % to the optimal loss, in 0.7 of the time.

Measured on six blocks of SmolLM2-135M, five ranks a linear up to break-even, as excess loss over
the optimal loss: `exact` up to 8e-11; `fast` up to 1.6e-9, and never above 0.18 of the excess of
the published algorithm, which is up to 2.1e-7. The deviation of `fast` was up to 5.4e-10. Time per
block relative to the published algorithm, one thread: `exact` 0.50, `fast` 0.41.
"""

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class Curvature:
    """Statistic of one linear: sum g g^T over gradients g of the loss with respect to its outputs
    y.

    Stored on the smaller side: `C` itself [O, O] where O <= I, else `W^T C W` [I, I], which is the
    second moment of `W^T g`.
    """

    matrix_KK: Tensor
    gradients: int
    """Number of gradients in the sum; their mean is the Fisher information of the outputs if the
    labels of the loss are drawn from the model."""


@dataclass(frozen=True, slots=True)
class InputMeans:
    """Statistic of a linear: means of its inputs by groups of sequences, and its bias."""

    sums_GI: Tensor
    """Sum of the input rows of each group, float64."""
    tokens_G: Tensor
    """Number of the rows, float64, 1 or more."""
    bias_O: Tensor | None = None
    """Bias of the dense linear; None: it has none."""


@dataclass(frozen=True, slots=True)
class InputGram:
    """Statistic of a site: H = sum x x^T over the input rows x of its linears."""

    matrix_II: Tensor
    tokens: int | None = None
    """Number of rows, if known: an upper bound of the rank of H."""
    magnitude_I: Tensor | None = None
    """Mean of |x_j| over the rows, float64, if the method needs it."""
    curvature: Curvature | None = None
    """Curvature of the loss with respect to the outputs, if the method needs it."""
    gradient: WeightGradient | DirectionGradients | None = None
    """Gradient of the loss by the weight or by its directions, if the method needs it."""
    means: InputMeans | None = None
    """Means of the inputs, if the method needs them."""


@dataclass(frozen=True, slots=True)
class OutputGram:
    """Statistic of one linear: W H W^T, the second moment of its outputs without bias."""

    matrix_OO: Tensor
    tokens: int | None = None
    """Number of rows, if known: an upper bound of the rank."""
    magnitude_I: Tensor | None = None
    """Mean of |x_j| over the input rows, float64, if the method needs it."""
    curvature: Curvature | None = None
    """Curvature of the loss with respect to the outputs, if the method needs it."""
    gradient: WeightGradient | DirectionGradients | None = None
    """Gradient of the loss by the weight or by its directions, if the method needs it."""
    means: InputMeans | None = None
    """Means of the inputs, if the method needs them."""


Statistic = InputGram | OutputGram


def summed(statistics: Sequence[Statistic]) -> Statistic:
    """Sum Grams of inputs, in their order, to the statistic of all rows.

    Raises:
        ValueError: One of several statistics is not a Gram of inputs.
    """
    first, *others = statistics
    for other in others:
        if not isinstance(first, InputGram) or not isinstance(other, InputGram):
            raise ValueError("only Grams of inputs can be summed; found another statistic")
        counts = first.tokens, other.tokens
        tokens = None if None in counts else sum(filter(None, counts))
        first = InputGram(first.matrix_II + other.matrix_II, tokens)
    return first


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Best approximations `weight_OR[:, :r] @ down_RI[:r]` of a weight, nested, for every rank r <=
    R."""

    weight_OR: Tensor
    """U: orthonormal columns, by descending energy."""
    down_RI: Tensor
    """U^T W."""
    energies_K: Tensor
    """All squared singular values of W H^(1/2), descending, float64."""
    total: float
    """trace(W H W^T), the energy of the whole weight; the loss at rank r is total less the first r
    energies."""
    report: dict[str, float | int | str]
    """Details of the computation, and measurements on the returned factors:

    - `precision`: `fast`, or `exact` if requested or if the fast result failed its check.
    - `basis`: basis of the weight's column space: `identity` (O <= I), `cholesky` of W^T W (fast),
      `householder` (exact, and fast if the columns are nearly dependent).
    - `known_rank`: number of directions with energy above the rounding noise of the statistic.
    - `orthonormality`: the largest entry of |U^T U - 1|.
    - `deviation`: |measured loss - predicted loss| at rank R, over the total energy.
    - `eigen`: fallback solvers used if the device's solver failed (`Eigensolver`).
    """


def decompose(
    weight_OI: Tensor,
    statistic: Statistic,
    rank: int,
    *,
    precision: Precision = "fast",
) -> LowRank:
    """Compute the factors, for every rank up to `rank`, with the least output error on the
    calibration rows.

    Minimises `trace(D H D^T)` for `D = W - W'` by `W' = U (U^T W)`, U the leading left singular
    vectors of `W H^(1/2)`; the minimum is the sum of the truncated squared singular values
    (Eckart-Young). No factor or inverse of H is needed. With `W = Q S`, Q an orthonormal basis of
    [O, K] (Q = 1 where O <= I), `U = Q Y` with Y the eigenvectors of `S H S^T`, a [K, K] matrix.

    If H has rank below K it does not determine the remaining directions of U. They are set to the
    leading left singular vectors of the unexplained part `(1 - U U^T) W` of the weight. A direction
    is known if its energy exceeds `K eps` of the largest one and twice the magnitude of the most
    negative one, which in a second moment is rounding noise. There are at most as many known
    directions as tokens.

    The factors have the weight's dtype, at least float32, and its device, on which the statistic
    must also be. Bit-identical for equal inputs, device and number of threads. O(O I^2 + K^3).

    Raises:
        InputError: The weight or the statistic contains NaN or infinity, or the statistic has a
            negative diagonal entry.

    References:
        SVD-LLM, arXiv:2403.07378, whose code computes the same minimum from a Cholesky factor of H,
        its inverse and an SVD in float32.
    """
    _check(weight_OI, statistic, rank)
    result = _compute(weight_OI, statistic, rank, precision)
    # Ten times the measured error of sound float32 factors; for float64, the bound implied by the
    # check of Q.
    bound = 1e-5 if result.weight_OR.dtype == torch.float32 else 1e-10
    found = max(float(result.report["deviation"]), float(result.report["orthonormality"]))
    if precision == "fast" and not found < bound:
        return _compute(weight_OI, statistic, rank, "exact")
    return result


def _compute(weight_OI: Tensor, statistic: Statistic, rank: int, precision: Precision) -> LowRank:
    """Compute the decomposition in one precision, with measurements on the result."""
    # for a 70B model each of these matrices is 0.5 to 1.9 GB: free each after its last use
    basis, basis_OK, core_KI = column_space(weight_OI.double().contiguous(), precision)
    moment_KK = second_moment(basis_OK, core_KI, statistic)
    # LAPACK through torch: the upper triangle takes 0.9 of the time of the lower one.
    eigen = Eigensolver()
    values_K, vectors_KK = eigen.decompose(moment_KK, upper=True)
    energies_K, vectors_KK = values_K.flip(0), vectors_KK.flip(1)

    known_rank = count_known(energies_K, statistic.tokens)
    energies_K[known_rank:] = 0
    if known_rank < rank:
        vectors_KK = complete(vectors_KK, known_rank, core_KI, eigen)

    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    assembly = torch.float64 if precision == "exact" else dtype
    vectors_KR = vectors_KK[:, :rank].to(assembly)
    del vectors_KK
    left_OR = vectors_KR if basis_OK is None else basis_OK.to(assembly) @ vectors_KR
    weight_OR = left_OR.to(dtype).contiguous()
    del basis_OK, left_OR
    down_RI = (vectors_KR.T @ core_KI.to(assembly)).to(dtype)

    total = float(moment_KK.trace())
    loss, orthonormality = _measure(
        weight_OR,
        down_RI,
        statistic,
        vectors_KR=vectors_KR,
        core_KI=core_KI,
        moment_KK=moment_KK,
    )
    predicted = total - float(energies_K[:rank].sum())
    return LowRank(
        weight_OR=weight_OR,
        down_RI=down_RI,
        energies_K=energies_K,
        total=total,
        report={
            "precision": precision,
            "basis": basis,
            "known_rank": known_rank,
            "orthonormality": orthonormality,
            "deviation": abs(loss - predicted) / total if total > 0 else abs(loss),
            **eigen.report,
        },
    )


def column_space(work_OI: Tensor, precision: Precision) -> tuple[str, Tensor | None, Tensor]:
    """Compute `W = Q S`, Q [O, K] with orthonormal columns and S [K, I]; None means Q = 1."""
    outputs, inputs = work_OI.shape
    if outputs <= inputs:
        return "identity", None, work_OI
    if precision == "fast":
        square_II = work_OI.new_zeros(inputs, inputs)
        add_upper_product(square_II, work_OI, work_OI)
        upper_II, info = torch.linalg.cholesky_ex(square_II, upper=True)
        # Sine of the angle between a column and the span of the earlier columns. Q is orthonormal
        # to eps over its square: 1e-3 gives 1e-10. Weights of trained models have 0.1 and more.
        sine = float((upper_II.diagonal() / upper_II.norm(dim=0)).min())
        if not int(info) and sine > 1e-3:
            # Transposed, the operands already have LAPACK's memory layout.
            basis_IO = torch.linalg.solve_triangular(upper_II.T, work_OI.T, upper=False)
            return "cholesky", basis_IO.T, upper_II
    return ("householder", *torch.linalg.qr(work_OI))


def second_moment(basis_OK: Tensor | None, core_KI: Tensor, statistic: Statistic) -> Tensor:
    """Compute the upper triangle of `S H S^T = Q^T (W H W^T) Q` [K, K]."""
    if isinstance(statistic, OutputGram):
        gram_OO = statistic.matrix_OO.double()
        if basis_OK is None:
            return gram_OO
        left_K, right_K = gram_OO @ basis_OK, basis_OK
    else:
        left_K, right_K = (core_KI @ statistic.matrix_II.double()).T, core_KI.T
    moment_KK = core_KI.new_zeros(len(core_KI), len(core_KI))
    add_upper_product(moment_KK, left_K, right_K)
    return moment_KK


def count_known(energies_K: Tensor, tokens: int | None) -> int:
    """Count the directions with energy above rounding noise; energies descend."""
    noise = max(len(energies_K) * EPS * float(energies_K[0]), -2 * float(energies_K[-1]))
    known_rank = int((energies_K > noise).sum())
    return known_rank if tokens is None else min(known_rank, tokens)


def complete(vectors_KK: Tensor, known_rank: int, core_KI: Tensor, eigen: Eigensolver) -> Tensor:
    """Rotate the vectors beyond the known ones so that they explain most of the weight."""
    free_K = vectors_KK[:, known_rank:]
    unexplained = free_K.T @ core_KI
    _, rotation = eigen.decompose(unexplained @ unexplained.T)
    return torch.cat([vectors_KK[:, :known_rank], free_K @ rotation.flip(1)], dim=1)


def _measure(
    weight_OR: Tensor,
    down_RI: Tensor,
    statistic: Statistic,
    *,
    vectors_KR: Tensor,
    core_KI: Tensor,
    moment_KK: Tensor,
) -> tuple[float, float]:
    """Measure the loss of the factors in the norm of the statistic, and the largest entry of |U^T U
    - 1|.

    The loss is computed within the column space, at a cost of K instead of O; rounding errors of U
    outside of it appear in the second number only.
    """
    size, inputs = core_KI.shape
    if isinstance(statistic, InputGram) and inputs < 2 * size:
        square_RR = weight_OR.T @ weight_OR
        gap_KI = torch.addmm(core_KI.to(down_RI), vectors_KR.to(down_RI), down_RI, alpha=-1)
        image_KI = gap_KI @ statistic.matrix_II.to(gap_KI)
        loss = torch.sum(gap_KI * image_KI, dtype=torch.float64)
    else:
        # Without H, or if K is much smaller than I: a difference of large numbers, for which
        # float32 would measure its own rounding.
        full_KK = moment_KK.triu() + moment_KK.triu(1).T
        wide_OR, wide_KR = weight_OR.double(), vectors_KR.to(down_RI).double()
        square_RR, kept_RR = wide_OR.T @ wide_OR, wide_KR.T @ (full_KK @ wide_KR)
        loss = full_KK.trace() - 2 * kept_RR.trace() + torch.sum(kept_RR * square_RR)
    square_RR.diagonal().sub_(1)
    return float(loss), float(square_RR.abs().max())


def _check(weight_OI: Tensor, statistic: Statistic, rank: int) -> None:
    outputs, inputs = weight_OI.shape
    if isinstance(statistic, InputGram):
        name, matrix, size = "input Gram", statistic.matrix_II, inputs
    else:
        name, matrix, size = "output Gram", statistic.matrix_OO, outputs
    if matrix.shape != (size, size):
        raise ValueError(f"{name} is {tuple(matrix.shape)}, the weight needs {(size, size)}")
    if not 1 <= rank <= min(outputs, inputs):
        raise ValueError(f"rank is {rank}, not in 1 to {min(outputs, inputs)}, the smaller side")
    check_finite("weight", weight_OI)
    check_finite(name, matrix)
    negative = int((matrix.diagonal() < 0).sum())
    if negative:
        raise InputError(
            f"{name} is not a second moment: {negative} of {size} diagonal entries are negative; "
            "calibrate again"
        )
