"""Low-rank factors of a weight with a bias: principal components of its outputs.

Shape suffixes: O outputs, I inputs, K = min(O, I), R rank, G groups of sequences.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import InputGram, Statistic, decompose
from orchestrator.linalg.scaled import ScaledLowRank, explained

Covariance = Literal["total", "pooled"]
"""Mean to which the covariance of outputs is: that of all tokens, or that of their group each."""
TOLERANCE = 1e-4
"""Part of a second moment below zero that a variance may be: rounding of its float32 products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineLowRank(ScaledLowRank):
    """Factors that are optimal beside a bias; energies and total are those of the covariance.

    Energies of directions and their total in `activation_R` and `activation_total` are of the
    outputs about the mean of all tokens.
    """

    input_mean_I: Tensor
    """Mean of the inputs, float64."""
    output_mean_O: Tensor
    """Mean of the outputs, the dense linear's own bias included, float64."""
    mean_energy: float
    """Part of Σ|W x|² in the mean of W x, which the bias keeps at every rank."""


def decompose_affine(
    weight_OI: Tensor, statistic: Statistic, rank: int, *, covariance: Covariance
) -> AffineLowRank:
    """Compute factors and the mean outputs for the bias, for every rank up to `rank`.

    With `total` they minimise `Σ |W x − (W' x + b)|²` over the T rows of the statistic, W' of rank
    r: b is the mean of (W − W') x, and `W' = U (Uᵀ W)`, U the leading eigenvectors of `T Σ`, Σ the
    covariance of W x. What is cut of `T Σ` is the loss. The mean is worth a rank at most: the best
    W' of rank r + 1 without a bias loses no more. With `pooled` Σ is about the mean of each group
    of sequences, weighted by tokens; variance between groups then has no part in the choice of U,
    nor in energies and total.

    `T Σ = W H Wᵀ − Σ_g n_g μ_g μ_gᵀ` for groups of n_g rows with mean outputs μ_g = W m_g, so any
    Gram and means of the inputs are enough. Products are float32 in a Gram, so that a variance
    below 1e-6 of its second moment is rounding; one below zero counts as zero.

    Dtype, device and bits as in `linalg.low_rank.decompose`. Its cost, and G O I.

    Raises:
        InputError: As `decompose`; or the means are not those of the rows of the Gram.
        ValueError: The statistic has no means.

    References:
        Bolaco, arXiv:2405.10616.
    """
    means = statistic.means
    if means is None:
        raise ValueError("affine factors need the means of the inputs beside their Gram")
    check_finite("mean of the inputs", means.sums_GI)
    check_finite("weight", weight_OI)
    tokens = float(means.tokens_G.sum())
    input_mean_I = means.sums_GI.sum(dim=0) / max(tokens, 1.0)
    image_O = weight_OI.double() @ input_mean_I
    rows_GI = tokens**0.5 * input_mean_I[None]
    is_pooled = covariance == "pooled"
    own_GI = means.sums_GI / means.tokens_G.sqrt()[:, None] if is_pooled else rows_GI
    whole = _centred(weight_OI, statistic, own_GI)
    result = decompose(weight_OI, whole, rank)
    if is_pooled:
        del whole  # of the size of the Gram
        whole = _centred(weight_OI, statistic, rows_GI)
    activation_R, activation_total = explained(weight_OI, result, whole)
    return AffineLowRank(
        **{field.name: getattr(result, field.name) for field in fields(result)},
        activation_R=activation_R,
        activation_total=activation_total,
        input_mean_I=input_mean_I,
        output_mean_O=image_O if means.bias_O is None else image_O + means.bias_O,
        mean_energy=tokens * float(image_O.square().sum()),
    )


def affine_bias(
    output_mean_O: Tensor, input_mean_I: Tensor, weight_OR: Tensor, down_RI: Tensor
) -> Tensor:
    """Return the bias by which factors keep the mean output, float64: `mean − U (D m)`.

    In exact arithmetic it is (1 − U Uᵀ) μ for D = Uᵀ W; of rounded factors the mean is kept too.
    """
    inner_R = down_RI.double() @ input_mean_I.double()
    bias_O: Tensor = output_mean_O.double() - weight_OR.double() @ inner_R
    return bias_O


def _centred(weight_OI: Tensor, statistic: Statistic, rows_GI: Tensor) -> Statistic:
    """Subtract the second moment of some rows of inputs from a Gram of inputs or outputs.

    The rows are means times the square root of their weight, so that the result is about them.
    """
    if isinstance(statistic, InputGram):
        matrix, rows_GK = statistic.matrix_II.double(), rows_GI
    else:
        matrix, rows_GK = statistic.matrix_OO.double(), rows_GI @ weight_OI.double().T
    known = None if statistic.tokens is None else max(statistic.tokens - len(rows_GI), 0)
    centred = torch.addmm(matrix, rows_GK.T, rows_GK, alpha=-1)
    variance, second = centred.diagonal(), matrix.diagonal()
    if bool((variance < -TOLERANCE * second.abs()).any()):
        raise InputError(
            "means of inputs are too large for their Gram, which is of other rows; calibrate again"
        )
    is_constant = variance < 0
    centred[is_constant] = 0
    centred[:, is_constant] = 0
    if isinstance(statistic, InputGram):
        return replace(statistic, matrix_II=centred, tokens=known)
    return replace(statistic, matrix_OO=centred, tokens=known)
