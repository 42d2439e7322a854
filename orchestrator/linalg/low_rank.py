"""Low-rank factors of one weight, best in the norm that its calibration inputs induce.

Shape suffixes: O outputs, I inputs, K = min(O, I), R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gram import add_upper_product, check_finite

Precision = Literal["exact", "fast"]
"""`exact` works in float64, with Householder reflections, and rounds the finished factors.

`fast`, the default, takes Q from a Cholesky factor of W^T W, multiplies Q, Y and S (see
`decompose`) in the factors' dtype, and becomes `exact` if what it measures on the result is out of
bounds. Eigenvectors are float64 in both: in float32 they would lose up to 8 % of the optimal loss,
for 0.7 of their time.

Measured on six blocks of SmolLM2-135M, five ranks a linear up to break-even, as loss above the
optimum over the optimum: `exact` up to 8e-11; `fast` up to 1.6e-9, and nowhere above 0.18 of what
the published way adds, which is up to 2.1e-7. The deviation of `fast` was up to 5.4e-10. Time of a
block over the published way's, one thread: `exact` 0.50, `fast` 0.41.
"""

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class Curvature:
    """Statistic of one linear: sum g g^T over gradients g of the loss by its outputs y.

    On the smaller side: `C` itself [O, O] where O <= I, else `W^T C W` [I, I], which is the second
    moment of `W^T g`.
    """

    matrix_KK: Tensor
    gradients: int
    """Number of gradients in the sum; their mean is the Fisher information of the outputs, if the
    labels of the loss are drawn from the model."""


@dataclass(frozen=True, slots=True)
class InputGram:
    """Statistic of a site: H = sum x x^T over the rows x that its linears read."""

    matrix_II: Tensor
    tokens: int | None = None
    """Number of rows, if known: H has no larger rank."""
    magnitude_I: Tensor | None = None
    """Mean of |x_j| over the rows, float64, where a method asks for it."""
    curvature: Curvature | None = None
    """How the loss bends with the outputs, where a method asks for it."""


@dataclass(frozen=True, slots=True)
class OutputGram:
    """Statistic of one linear: W H W^T, the second moment of its outputs without the bias."""

    matrix_OO: Tensor
    tokens: int | None = None
    """Number of rows, if known: the Gram has no larger rank."""
    magnitude_I: Tensor | None = None
    """Mean of |x_j| over the rows that were read, float64, where a method asks for it."""
    curvature: Curvature | None = None
    """How the loss bends with the outputs, where a method asks for it."""


Statistic = InputGram | OutputGram


def summed(statistics: Sequence[Statistic]) -> Statistic:
    """The statistic of all rows together: Grams of inputs add up, in their order.

    Raises:
        ValueError: There are several, and not all of them are Grams of inputs.
    """
    first, *others = statistics
    for other in others:
        if not isinstance(first, InputGram) or not isinstance(other, InputGram):
            raise ValueError("only Grams of inputs are those of one and the same sum")
        counts = first.tokens, other.tokens
        tokens = None if None in counts else sum(filter(None, counts))
        first = InputGram(first.matrix_II + other.matrix_II, tokens)
    return first


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """Best approximations `weight_OR[:, :r] @ down_RI[:r]` of a weight, nested, for all r <= R."""

    weight_OR: Tensor
    """U: orthonormal columns, by descending energy."""
    down_RI: Tensor
    """U^T W."""
    energies_K: Tensor
    """All squared singular values of W H^(1/2), descending, float64."""
    total: float
    """trace(W H W^T): the energy of the whole weight; rank r loses total less r energies."""
    report: dict[str, float | int | str]
    """How it was computed and what was measured on the factors as they are returned:

    - `precision`: `fast`, or `exact` if that was asked or the fast result failed its check.
    - `basis`: how the weight's column space was found: `identity` (O <= I), `cholesky` of W^T W
      (fast), `householder` (exact, and fast if the columns are too close to dependent).
    - `known_rank`: directions whose energy stands out of the statistic's rounding noise.
    - `orthonormality`: the largest entry of |U^T U - 1|.
    - `deviation`: |measured loss - predicted loss| at rank R, over the total energy.
    - `eigen`: the solvers that stood in for the device's, if it failed (`Eigensolver`).
    """


def decompose(
    weight_OI: Tensor,
    statistic: Statistic,
    rank: int,
    *,
    precision: Precision = "fast",
) -> LowRank:
    """The factors, of every rank up to `rank`, that change the outputs least on the rows seen.

    Minimises `trace(D H D^T)` for `D = W - W'` by `W' = U (U^T W)`, U the leading left singular
    vectors of `W H^(1/2)`; the minimum is the sum of the squared singular values that were cut
    (Eckart-Young). No factor or inverse of H is needed. With `W = Q S`, Q an orthonormal basis of
    [O, K] (Q = 1 where O <= I), `U = Q Y` with Y the eigenvectors of `S H S^T`, a [K, K] matrix.

    Where H has rank below K the remaining directions of U are free as far as H knows; they are
    the leading left singular vectors of the unexplained `(1 - U U^T) W`, so the weight itself
    decides. A direction is known if its energy is above `K eps` of the largest and above twice the
    most negative one, which in a second moment is rounding noise; no more of them than tokens.

    The factors have the weight's dtype, float32 at least, and live on its device, as the
    statistic must. The same input gives the same bits on the same device with the same number
    of threads. O(O I^2 + K^3).

    Raises:
        InputError: The weight or the statistic holds NaN or infinity, or the statistic has a
            negative diagonal.

    References:
        SVD-LLM, arXiv:2403.07378, whose code reaches the same minimum by a Cholesky factor of
        H, its inverse and an SVD in float32.
    """
    _check(weight_OI, statistic, rank)
    result = _compute(weight_OI, statistic, rank, precision)
    # Ten times what sound float32 factors measure; for float64, what the guard on Q lets pass.
    bound = 1e-5 if result.weight_OR.dtype == torch.float32 else 1e-10
    found = max(float(result.report["deviation"]), float(result.report["orthonormality"]))
    if precision == "fast" and not found < bound:
        return _compute(weight_OI, statistic, rank, "exact")
    return result


def _compute(weight_OI: Tensor, statistic: Statistic, rank: int, precision: Precision) -> LowRank:
    """The decomposition in one precision, and what was measured on it."""
    # of a 70B model each of these matrices is 0.5 to 1.9 GB, so none outlives its last use
    basis, basis_OK, core_KI = column_space(weight_OI.double().contiguous(), precision)
    moment_KK = second_moment(basis_OK, core_KI, statistic)
    # LAPACK through torch: the upper triangle takes 0.9 of the lower one's time.
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
    loss, orthonormality = _measure(weight_OR, vectors_KR, down_RI, core_KI, moment_KK, statistic)
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
    """`W = Q S` with orthonormal columns of Q [O, K], S [K, I]; None stands for Q = 1."""
    outputs, inputs = work_OI.shape
    if outputs <= inputs:
        return "identity", None, work_OI
    if precision == "fast":
        square_II = work_OI.new_zeros(inputs, inputs)
        add_upper_product(square_II, work_OI, work_OI)
        upper_II, info = torch.linalg.cholesky_ex(square_II, upper=True)
        # The sine of a column's angle to the columns before it. Q is orthonormal to eps over its
        # square: 1e-3 leaves 1e-10. Weights of trained models measure 0.1 and more.
        sine = float((upper_II.diagonal() / upper_II.norm(dim=0)).min())
        if not int(info) and sine > 1e-3:
            # Transposed, the operands already lie in memory as LAPACK reads them.
            basis_IO = torch.linalg.solve_triangular(upper_II.T, work_OI.T, upper=False)
            return "cholesky", basis_IO.T, upper_II
    return ("householder", *torch.linalg.qr(work_OI))


def second_moment(basis_OK: Tensor | None, core_KI: Tensor, statistic: Statistic) -> Tensor:
    """`S H S^T = Q^T (W H W^T) Q` [K, K], its upper triangle."""
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
    """Number of directions whose energy is more than rounding noise; energies descend."""
    noise = max(len(energies_K) * EPS * float(energies_K[0]), -2 * float(energies_K[-1]))
    known_rank = int((energies_K > noise).sum())
    return known_rank if tokens is None else min(known_rank, tokens)


def complete(vectors_KK: Tensor, known_rank: int, core_KI: Tensor, eigen: Eigensolver) -> Tensor:
    """The vectors, those beyond the known ones turned to explain most of the weight."""
    free_K = vectors_KK[:, known_rank:]
    unexplained = free_K.T @ core_KI
    _, turn = eigen.decompose(unexplained @ unexplained.T)
    return torch.cat([vectors_KK[:, :known_rank], free_K @ turn.flip(1)], dim=1)


def _measure(
    weight_OR: Tensor,
    vectors_KR: Tensor,
    down_RI: Tensor,
    core_KI: Tensor,
    moment_KK: Tensor,
    statistic: Statistic,
) -> tuple[float, float]:
    """Loss of the factors in the statistic's norm, and the largest entry of |U^T U - 1|.

    The loss is taken within the column space, where it costs K instead of O; rounding of U
    outside of it shows in the second number alone.
    """
    size, inputs = core_KI.shape
    if isinstance(statistic, InputGram) and inputs < 2 * size:
        square_RR = weight_OR.T @ weight_OR
        gap_KI = torch.addmm(core_KI.to(down_RI), vectors_KR.to(down_RI), down_RI, alpha=-1)
        image_KI = gap_KI @ statistic.matrix_II.to(gap_KI)
        loss = torch.sum(gap_KI * image_KI, dtype=torch.float64)
    else:
        # Without H, or where K is much cheaper than I: a difference of large numbers, which in
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
            f"{name} is no second moment: {negative} of {size} diagonal entries are negative; "
            "calibrate again"
        )
