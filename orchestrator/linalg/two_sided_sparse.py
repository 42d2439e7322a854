"""A pruned weight and factors of what pruning lost, best in the norm of inputs and of the loss.

Shape suffixes: O outputs, I inputs, R rank, N entries, P points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orchestrator.linalg.fit_entries import correlations
from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.linalg.two_sided import TwoSidedLowRank, decompose_two_sided

RANKS = 12
"""Equal steps from rank 0 to the largest, at which losses are told."""
DENSE_SHARES = (0.7, 0.8, 0.85, 0.9, 0.95)
"""Densities at which the loss of pruning alone is measured, beside those that have factors."""
ROUNDING = 1e-6
"""Damping of a curvature that is damped already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What entries and factors together lose: D is the weight less both."""

    rank: int
    nonzeros: int
    loss: float
    """`trace(C D H D^T)`: twice what all tokens lose, in nats."""
    activation_loss: float
    """`trace(D H D^T)`."""
    weight_loss: float
    """`|D|^2`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLowRank:
    """The most important entries of a weight, and for some numbers of them factors of the rest."""

    weight_OI: Tensor
    curvature_O: Tensor
    """Root of the damped C's diagonal, float32."""
    square_I: Tensor
    """Root of H's diagonal, float32. Both and the weight give the order of the entries."""
    correlations: tuple[Tensor, Tensor] | None
    """Of the damped C and of H, where entries are to be fitted."""
    factors: Mapping[int, tuple[Tensor, Tensor]]
    """By the number of entries kept: `weight_OR` and `down_RI` of the others, nested in rank."""
    mixes_P: tuple[Mix, ...]
    """By entries, then by rank."""
    report: dict[str, float | int | str]
    """Of the factors: of the weight itself, but the largest `deviation` of all."""


def sparse_low_rank(
    weight_OI: Tensor,
    statistic: InputGram,
    densities: Sequence[float],
    ranks: float,
    *,
    damping: float,
    fits: bool = False,
) -> SparseLowRank:
    """Entries S of a weight as they are, and the best factors L of what is left without them.

    To second order, all tokens together lose ½ trace(C D H D^T), D = W - S - L (see
    `decompose_two_sided`, C damped alike). Entries come in the order of `C_ii H_jj W_ij^2`, which
    is what each alone would lose. For each number of them, at `densities` (ascending from 0), L of
    every rank is the optimum for this S, the two-sided truncation of W - S, and its loss is exact:
    the tail of the squared singular values. So factors make good what pruning does to many outputs
    in common. The other way round, entries beside the factors of the whole weight, loses more at
    every rank: on a v_proj of SmolLM2-135M at 0.4 of its values 7 times as much.

    With diagonal C and H the entries are the best of their number. Density 0 is `two-sided`.

    Ranks go up to `ranks` times break-even, or to what a density leaves, (1 - density) O I / (O +
    I), if that is less; losses are told at `RANKS` steps. One `decompose_two_sided` for each
    density, and O I (O + I) multiply-adds for each of `DENSE_SHARES`. Needs C [O, O] and H [I, I]
    whatever the shape: 3.3 GB in float32 on the wide side of a 70B model's MLP. Factors have the
    weight's dtype, float32 at least. With `fits` the result has what `fit_entries` needs later.

    Raises:
        InputError: As `decompose_two_sided`.
        ValueError: The statistic has no curvature of the outputs.
    """
    outputs, inputs = weight_OI.shape
    bend_OO, is_seen = _damped(weight_OI, statistic, damping)
    matrix_II = statistic.matrix_II.double()
    check_finite("input Gram", matrix_II)
    curvature_O = bend_OO.diagonal().sqrt().float()
    square_I = matrix_II.diagonal().clamp(min=0).sqrt().float()
    order_N = entry_order(weight_OI, curvature_O, square_I)
    entries, break_even = weight_OI.numel(), weight_OI.numel() // (outputs + inputs)
    factors, mixes, reports = {}, [], []
    rest_OI, start = weight_OI.clone(memory_format=torch.contiguous_format), 0
    for nonzeros in sorted({int(density * entries) for density in densities}):
        rest_OI.view(-1)[order_N[start:nonzeros]] = 0
        start = nonzeros
        free = (entries - nonzeros - 1) // (outputs + inputs)
        most = min(int(ranks * break_even), free)
        found = _factors(rest_OI, statistic, bend_OO, max(most, 1))
        mixes += _mixes(rest_OI, found, nonzeros, most)
        factors[nonzeros] = found.weight_OR[:, :most], found.down_RI[:most]
        reports.append(found.report)
    for nonzeros in sorted({int(share * entries) for share in DENSE_SHARES} | {entries}):
        if nonzeros > start:
            rest_OI.view(-1)[order_N[start:nonzeros]] = 0
            start = nonzeros
            mixes.append(_pruned(rest_OI, matrix_II, bend_OO, nonzeros))
    return SparseLowRank(
        weight_OI=weight_OI,
        curvature_O=curvature_O,
        square_I=square_I,
        correlations=(correlations(bend_OO), correlations(matrix_II)) if fits else None,
        factors=factors,
        mixes_P=tuple(mix if is_seen else replace(mix, loss=0.0) for mix in mixes),
        report=reports[0] | _worst(reports),
    )


def _worst(reports: Sequence[Mapping[str, float | int | str]]) -> dict[str, float | int | str]:
    """The largest deviation, and any solver that stood in."""
    worst: dict[str, float | int | str] = {}
    for each in reports:
        worst |= {"eigen": each["eigen"]} if "eigen" in each else {}
    return worst | {"deviation": max(each["deviation"] for each in reports)}


def entry_order(weight_OI: Tensor, curvature_O: Tensor, square_I: Tensor) -> Tensor:
    """Positions of all entries, what each alone would lose descending; ties by position, int64."""
    score_OI = weight_OI.abs() * square_I * curvature_O[:, None]
    return score_OI.flatten().argsort(descending=True, stable=True)


def _damped(weight_OI: Tensor, statistic: InputGram, damping: float) -> tuple[Tensor, bool]:
    """The damped C, float64 [O, O]; 1 where no gradient was seen, and whether one was."""
    curvature, outputs = statistic.curvature, len(weight_OI)
    if curvature is None or curvature.matrix_KK.shape != (outputs, outputs):
        found = None if curvature is None else tuple(curvature.matrix_KK.shape)
        raise ValueError(
            f"curvature is {found}; entries need that of outputs, {(outputs, outputs)}"
        )
    mean_OO = curvature.matrix_KK.double() / max(curvature.gradients, 1)
    check_finite("curvature", mean_OO)
    size = float(mean_OO.diagonal().mean())
    if size <= 0:
        return torch.eye(outputs, dtype=torch.float64, device=weight_OI.device), False
    mean_OO.diagonal().add_(damping * size)
    return mean_OO, True


def _factors(rest_OI: Tensor, statistic: InputGram, bend_OO: Tensor, rank: int) -> TwoSidedLowRank:
    """The two-sided factors of what is not kept; the curvature enters on the smaller side."""
    outputs, inputs = rest_OI.shape
    wide_OI = rest_OI.double()
    bend = bend_OO if outputs <= inputs else wide_OI.T @ (bend_OO @ wide_OI)
    given = replace(statistic, curvature=Curvature(bend, 1))
    return decompose_two_sided(rest_OI, given, rank, damping=ROUNDING)


def _mixes(rest_OI: Tensor, found: TwoSidedLowRank, nonzeros: int, most: int) -> list[Mix]:
    """What is lost at steps of the rank: totals less what the directions so far explain."""
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


def _pruned(rest_OI: Tensor, matrix_II: Tensor, bend_OO: Tensor, nonzeros: int) -> Mix:
    """What is lost without factors; products in the weight's dtype, float32 at least."""
    rest_OI = rest_OI.to(torch.promote_types(rest_OI.dtype, torch.float32))
    image_OI = rest_OI @ matrix_II.to(rest_OI)
    products = ((bend_OO.to(rest_OI) @ rest_OI) * image_OI, rest_OI * image_OI, rest_OI.square())
    # rounding may leave what is next to nothing below it
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
