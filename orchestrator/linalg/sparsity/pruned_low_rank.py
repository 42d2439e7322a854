"""Low-rank factors of a pruned weight, optimal beside weights of its rows.

Shape suffixes: O outputs, I inputs, K = min(O, I), R rank, B = ceil(O I / 8) bytes of a mask.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.eigen import Eigensolver
from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import InputGram, OutputGram, Statistic, decompose
from orchestrator.linalg.two_sided import TwoSidedLowRank

LEAST_WEIGHT = 1e-3
"""Smallest weight of a row, as a fraction of the mean of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedLowRank(TwoSidedLowRank):
    """Factors of M ∘ W, measured against W; spectra of both, float64, descending."""

    pruned_K: Tensor
    """Squared singular values of M ∘ W."""
    dense_K: Tensor
    """Squared singular values of W."""
    mask_B: Tensor
    """The bits of M by position, uint8: eight to a byte, the first one lowest."""


def decompose_pruned(
    weight_OI: Tensor,
    statistic: InputGram,
    score_OI: Tensor,
    rank: int,
    *,
    density: float,
    weighs_rows: bool,
    weighs_inputs: bool,
) -> PrunedLowRank:
    """Prune a weight by scores, and compute factors of what is left for every rank up to `rank`.

    M keeps the entries of W with the largest scores S. With Λ = diag(d) the factors minimise
    `|Λ (M ∘ W − W')|` in the Frobenius norm, by `W' = Λ⁻¹ U (Uᵀ Λ (M ∘ W))`, U the leading left
    singular vectors of Λ (M ∘ W). `d_o² = Σ_j M_oj S_oj` if rows are weighed, at least
    `LEAST_WEIGHT` of the mean of d, else 1. If inputs are weighed, the norm is `trace(Λ E H Eᵀ Λ)`,
    H their second moment: two-sided with the diagonal C = Λ².

    Energies and total are in that norm, those of M ∘ W; `activation_R` and `weight_R` are of W, so
    that they count what pruning loses, and may be below zero. The report has the kept fraction of
    the entries, the rows and columns that have any, and the ranks of M ∘ W and of W: singular
    values above max(O, I) eps of float32 times the largest.

    Dtype, device and bits as in `linalg.low_rank.decompose`, with three times its O(K³).

    Args:
        statistic: Gram of the inputs of W.
        score_OI: Scores, 0 or above.
        density: Fraction of entries that M keeps, rounded down; if none, the row of largest sum S.

    Raises:
        InputError: The weight, the scores or the Gram contain NaN or infinity, or all scores are 0.
        ValueError: The shapes do not match.

    References:
        LPAF, arXiv:2306.14152, known here by its abstract: a reconstruction.
    """
    if score_OI.shape != weight_OI.shape:
        raise ValueError(f"scores are {tuple(score_OI.shape)}, the weight {tuple(weight_OI.shape)}")
    pruned = _prune(weight_OI, score_OI, density, weighs_rows=weighs_rows)
    given = statistic if weighs_inputs else _frobenius(pruned.scaled_OI)
    result = decompose(pruned.scaled_OI, given, rank)
    dense_K = _spectrum(weight_OI)
    ranks = {"weight_rank": _rank(dense_K, max(weight_OI.shape))}
    left_OR = (result.weight_OR.double() / pruned.scale_O1).to(result.weight_OR.dtype)
    result = replace(result, weight_OR=left_OR, report=result.report | pruned.report | ranks)
    pruned_K, mask_B = pruned.energies_K, pruned.mask_B
    # for a 70B model each of these matrices is 0.2 to 1.9 GB: free each after its last use
    del given, pruned
    factors, moment_II = (left_OR, result.down_RI), statistic.matrix_II.double()
    activation_R, activation_total = _explained(weight_OI, *factors, moment_II)
    return PrunedLowRank(
        **{field.name: getattr(result, field.name) for field in fields(result)},
        activation_R=activation_R,
        activation_total=activation_total,
        weight_R=_explained(weight_OI, *factors, None)[0],
        pruned_K=pruned_K,
        dense_K=dense_K,
        mask_B=mask_B,
    )


def masked(weight_OI: Tensor, mask_B: Tensor) -> Tensor:
    """Return M ∘ W in the dtype of W, from the packed bits of M: a copy, and 2 bytes an entry."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=mask_B.device)
    bits_N = ((mask_B[:, None] >> shifts_8) & 1).view(-1)[: weight_OI.numel()]
    return torch.where(bits_N.view(weight_OI.shape).bool(), weight_OI, 0)


def _packed(mask_OI: Tensor) -> Tensor:
    """Pack a mask to bits [B]."""
    padding = -mask_OI.numel() % 8
    bits_B8 = torch.nn.functional.pad(mask_OI.flatten().to(torch.uint8), (0, padding)).view(-1, 8)
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=mask_OI.device)
    return (bits_B8 << shifts_8).sum(dim=1, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class _Pruned:
    """A pruned weight, scaled by the weights of its rows, in the dtype of the factors."""

    scaled_OI: Tensor
    scale_O1: Tensor
    """Weights of the rows, float64."""
    energies_K: Tensor
    """Squared singular values of the pruned weight, not scaled."""
    mask_B: Tensor
    report: dict[str, float | int | str]


def _prune(weight_OI: Tensor, score_OI: Tensor, density: float, *, weighs_rows: bool) -> _Pruned:
    """Prune a weight, and scale its rows; raises the errors of `decompose_pruned`."""
    check_finite("weight", weight_OI)
    check_finite("scores", score_OI)
    mask_OI, row = _keep(score_OI, density)
    pruned_OI = torch.where(mask_OI, weight_OI.double(), 0.0)
    scale_O1 = torch.ones(len(weight_OI), 1, dtype=torch.float64, device=weight_OI.device)
    if weighs_rows:
        kept_O1 = torch.where(mask_OI, score_OI.double(), 0.0).sum(dim=1, keepdim=True).sqrt()
        scale_O1 = kept_O1.clamp(min=LEAST_WEIGHT * float(kept_O1.mean()))
    energies_K = _spectrum(pruned_OI)
    report: dict[str, float | int | str] = {
        "density": int(mask_OI.sum()) / mask_OI.numel(),
        "rows": int(mask_OI.any(dim=1).sum()),
        "columns": int(mask_OI.any(dim=0).sum()),
        "pruned_rank": _rank(energies_K, max(weight_OI.shape)),
        **({} if row is None else {"only_row": row}),
    }
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    scaled_OI = (scale_O1 * pruned_OI).to(dtype)
    return _Pruned(scaled_OI, scale_O1, energies_K, _packed(mask_OI), report)


def _keep(score_OI: Tensor, density: float) -> tuple[Tensor, int | None]:
    """Return the mask of the largest scores, ties by position, and the row if only one is kept."""
    if not bool(score_OI.any()):
        raise InputError(
            "all scores |Σ W ∘ G| are zero: the loss does not depend on the weight; calibrate on "
            "more text, or leave the linear out by --ignore"
        )
    count = math.floor(density * score_OI.numel())
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    if count:
        order_N = score_OI.flatten().argsort(descending=True, stable=True)
        mask_OI.view(-1)[order_N[:count]] = True
        return mask_OI, None
    row = int(score_OI.sum(dim=1, dtype=torch.float64).argmax())
    mask_OI[row] = True
    return mask_OI, row


def _frobenius(scaled_OI: Tensor) -> Statistic:
    """Return the statistic of inputs that are all alike, on the smaller side."""
    outputs, inputs = scaled_OI.shape
    wide_OI = scaled_OI.double()
    if outputs <= inputs:
        return OutputGram(wide_OI @ wide_OI.T)
    return InputGram(torch.eye(inputs, dtype=torch.float64, device=scaled_OI.device))


def _spectrum(weight_OI: Tensor) -> Tensor:
    """Return the squared singular values of a weight, float64, descending."""
    wide_OI = weight_OI.double()
    outputs, inputs = wide_OI.shape
    square_KK = wide_OI @ wide_OI.T if outputs <= inputs else wide_OI.T @ wide_OI
    values_K, _ = Eigensolver().decompose(square_KK, upper=True)
    return values_K.flip(0).clamp(min=0)


def _rank(energies_K: Tensor, size: int) -> int:
    """Count the singular values that a float32 weight of this size determines."""
    least = size * torch.finfo(torch.float32).eps
    return int((energies_K.sqrt() > least * energies_K[0].sqrt()).sum())


def _explained(
    weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor, moment_II: Tensor | None
) -> tuple[Tensor, float]:
    """Compute by how much each direction reduces `trace((W − L R) H (W − L R)ᵀ)`, and the trace
    before the first; None: H = 1.

    The product is no projection of W, so the reduction depends on the earlier directions.
    """
    wide_OI, left_OR, right_RI = weight_OI.double(), left_OR.double(), right_RI.double()
    image_RI = right_RI if moment_II is None else right_RI @ moment_II
    whole_OI = wide_OI if moment_II is None else wide_OI @ moment_II
    cross_RR = (left_OR.T @ left_OR) * (image_RI @ right_RI.T)
    explained_R = 2 * torch.sum((wide_OI @ image_RI.T) * left_OR, dim=0)
    explained_R -= cross_RR.diagonal() + 2 * cross_RR.tril(-1).sum(dim=1)
    return explained_R, float(torch.sum(whole_OI * wide_OI))
