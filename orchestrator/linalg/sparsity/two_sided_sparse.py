"""Pruned weight plus low-rank factors of the pruned part, optimal in the norms of inputs and loss.

Shape suffixes: O outputs, I inputs, R rank, N entries, P points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.linalg.sparsity.fit_entries import correlations
from orchestrator.linalg.two_sided import TwoSidedLowRank, decompose_two_sided

RANKS = 12
"""Number of equal steps from rank 0 to the largest rank; losses are computed at each."""
DENSE_SHARES = (0.7, 0.8, 0.85, 0.9, 0.95)
"""Densities at which the loss of pruning alone is measured, in addition to those with factors."""
ROUNDING = 1e-6
"""Damping of a curvature that is already damped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Loss of a mix of sparse entries and low-rank factors; D is the weight less both."""

    rank: int
    nonzeros: int
    loss: float
    """`trace(C D H D^T)`: twice the loss increase over all tokens, in nats."""
    activation_loss: float
    """`trace(D H D^T)`."""
    weight_loss: float
    """`|D|^2`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLowRank:
    """Entries of a weight by importance, and low-rank factors of the remainder for some numbers of
    entries."""

    weight_OI: Tensor
    curvature_O: Tensor
    """Square root of the diagonal of the damped C, float32."""
    square_I: Tensor
    """Square root of the diagonal of H, float32. Both, with the weight, determine the order of the
    entries."""
    correlations: tuple[Tensor, Tensor] | None
    """Correlations of the damped C and of H, if entries are to be fitted; otherwise None."""
    factors: Mapping[int, tuple[Tensor, Tensor]]
    """By number of entries kept: `weight_OR` and `down_RI` of the remainder, nested in rank."""
    mixes_P: tuple[Mix, ...]
    """Sorted by entries, then by rank."""
    report: dict[str, float | int | str]
    """Report of the factors of the weight itself, with the largest `deviation` of all factors."""


def sparse_low_rank(
    weight_OI: Tensor,
    statistic: InputGram,
    densities: Sequence[float],
    ranks: float,
    *,
    damping: float,
    fits: bool = False,
) -> SparseLowRank:
    """Select entries S of a weight and compute the best factors L of the remainder.

    To second order the loss over all tokens increases by ½ trace(C D H D^T), D = W - S - L (see
    `decompose_two_sided`, with the same damping of C). Entries are sorted by `C_ii H_jj W_ij^2`,
    the loss of removing each alone. For each number of entries, at `densities` (ascending from 0),
    L of every rank is the optimum for this S, the two-sided truncation of W - S, and its loss is
    exact: the tail of the squared singular values. The factors thus correct the error of pruning
    that many outputs share. The reverse order, entries in addition to factors of the whole weight,
    has a larger loss at every rank: 7 times as large for a v_proj of SmolLM2-135M at 0.4 of its
    values.

    With diagonal C and H the selection of entries is optimal. Density 0 is `two-sided`. Ranks go up
    to `ranks` times break-even, or to (1 - density) O I / (O + I), the rank that a density leaves
    room for, if smaller; losses are computed at `RANKS` steps. Costs one `decompose_two_sided` per
    density, and O I (O + I) multiply-adds for each of `DENSE_SHARES`. Needs C [O, O] and H [I, I]
    for every shape: 3.3 GB in float32 on the wide side of a 70B model's MLP. Factors have the
    weight's dtype, at least float32. `fits` adds the correlations that `fit_entries` needs.

    Raises:
        InputError: As `decompose_two_sided`.
        ValueError: The statistic has no curvature, or not that of the outputs.
    """
    outputs, inputs = weight_OI.shape
    damped_OO, is_seen = _damped(weight_OI, statistic, damping)
    matrix_II = statistic.matrix_II.double()
    check_finite("input Gram", matrix_II)
    curvature_O = damped_OO.diagonal().sqrt().float()
    square_I = matrix_II.diagonal().clamp(min=0).sqrt().float()
    order_N = entry_order(weight_OI, curvature_O, square_I)
    entries, break_even = weight_OI.numel(), weight_OI.numel() // (outputs + inputs)
    factors, mixes, reports = {}, [], []
    rest_OI, start = weight_OI.clone(memory_format=torch.contiguous_format), 0
    for nonzeros in sorted({int(density * entries) for density in densities}):
        rest_OI.view(-1)[order_N[start:nonzeros]] = 0
        start = nonzeros
        most = min(int(ranks * break_even), (entries - nonzeros - 1) // (outputs + inputs))
        found = _factors(rest_OI, statistic, damped_OO, max(most, 1))
        mixes += _mixes(rest_OI, found, nonzeros, most)
        factors[nonzeros] = found.weight_OR[:, :most], found.down_RI[:most]
        reports.append(found.report)
    mixes += _pruned_mixes(rest_OI, matrix_II, damped_OO, order_N, start=start)
    return SparseLowRank(
        weight_OI=weight_OI,
        curvature_O=curvature_O,
        square_I=square_I,
        correlations=(correlations(damped_OO), correlations(matrix_II)) if fits else None,
        factors=factors,
        mixes_P=tuple(mix if is_seen else replace(mix, loss=0.0) for mix in mixes),
        report=reports[0] | _worst(reports),
    )


def _worst(reports: Sequence[Mapping[str, float | int | str]]) -> dict[str, float | int | str]:
    """Return the largest deviation, and the fallback solvers used."""
    worst: dict[str, float | int | str] = {}
    for each in reports:
        worst |= {"eigen": each["eigen"]} if "eigen" in each else {}
    return worst | {"deviation": max(each["deviation"] for each in reports)}


def entry_order(weight_OI: Tensor, curvature_O: Tensor, square_I: Tensor) -> Tensor:
    """Sort the positions of all entries by descending loss of removing each alone; ties by
    position, int64."""
    score_OI = weight_OI.abs() * square_I * curvature_O[:, None]
    return score_OI.flatten().argsort(descending=True, stable=True)


def _damped(weight_OI: Tensor, statistic: InputGram, damping: float) -> tuple[Tensor, bool]:
    """Return the damped C, float64 [O, O], or the identity if no gradient is nonzero; and True if
    one is."""
    curvature, outputs = statistic.curvature, len(weight_OI)
    if curvature is None or curvature.matrix_KK.shape != (outputs, outputs):
        found = None if curvature is None else tuple(curvature.matrix_KK.shape)
        raise ValueError(
            f"curvature is {found}; entries need that of the outputs, {(outputs, outputs)}"
        )
    mean_OO = curvature.matrix_KK.double() / max(curvature.gradients, 1)
    check_finite("curvature", mean_OO)
    size = float(mean_OO.diagonal().mean())
    if size <= 0:
        return torch.eye(outputs, dtype=torch.float64, device=weight_OI.device), False
    mean_OO.diagonal().add_(damping * size)
    return mean_OO, True


def _factors(
    rest_OI: Tensor, statistic: InputGram, damped_OO: Tensor, rank: int
) -> TwoSidedLowRank:
    """Compute two-sided factors of the remainder; the curvature is used on the smaller side."""
    outputs, inputs = rest_OI.shape
    wide_OI = rest_OI.double()
    matrix_KK = damped_OO if outputs <= inputs else wide_OI.T @ (damped_OO @ wide_OI)
    given = replace(statistic, curvature=Curvature(matrix_KK, 1))
    return decompose_two_sided(rest_OI, given, rank, damping=ROUNDING)


def _mixes(rest_OI: Tensor, found: TwoSidedLowRank, nonzeros: int, most: int) -> list[Mix]:
    """Compute losses at steps of the rank: totals less the energy explained by the leading
    directions."""
    weight_total = float(rest_OI.double().square().sum())
    totals = found.total, found.activation_total, weight_total
    explained = found.energies_K, found.activation_R, found.weight_R
    mixes = []
    for rank in sorted({step * most // RANKS for step in range(RANKS + 1)}):
        left = [
            max(total - float(part[:rank].sum()), 0.0)
            for total, part in zip(totals, explained, strict=True)
        ]
        mixes.append(_mix(rank, nonzeros, left))
    return mixes


def _pruned_mixes(
    rest_OI: Tensor, matrix_II: Tensor, damped_OO: Tensor, order_N: Tensor, *, start: int
) -> list[Mix]:
    """Compute the losses without factors at more entries than `start`; overwrites `rest_OI`."""
    entries, mixes = rest_OI.numel(), []
    for nonzeros in sorted({int(share * entries) for share in DENSE_SHARES} | {entries}):
        if nonzeros > start:
            rest_OI.view(-1)[order_N[start:nonzeros]] = 0
            start = nonzeros
            mixes.append(_pruned(rest_OI, matrix_II, damped_OO, nonzeros))
    return mixes


def _pruned(rest_OI: Tensor, matrix_II: Tensor, damped_OO: Tensor, nonzeros: int) -> Mix:
    """Compute the loss without factors; products in the weight's dtype, at least float32."""
    rest_OI = rest_OI.to(torch.promote_types(rest_OI.dtype, torch.float32))
    image_OI = rest_OI @ matrix_II.to(rest_OI)
    products = ((damped_OO.to(rest_OI) @ rest_OI) * image_OI, rest_OI * image_OI, rest_OI.square())
    # rounding may give slightly negative losses
    left = [max(float(torch.sum(each, dtype=torch.float64)), 0.0) for each in products]
    return _mix(0, nonzeros, left)


def _mix(rank: int, nonzeros: int, left: Sequence[float]) -> Mix:
    loss, activation_loss, weight_loss = left
    return Mix(
        rank=rank,
        nonzeros=nonzeros,
        loss=loss,
        activation_loss=activation_loss,
        weight_loss=weight_loss,
    )
