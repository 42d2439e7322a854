"""Entries of one weight, sorted by importance.

Shape suffixes: O outputs, I inputs, N entries, P parts.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite
from orchestrator.linalg.low_rank import InputGram

PARTS = 20
"""Number of equal parts of the sorted entries; losses are known at their edges, every 5 % of the
density."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """Sparse approximations of a weight, nested: the kept entries are always a prefix."""

    values_N: Tensor
    """Entries of the weight, most important first, float32."""
    positions_N: Tensor
    """Positions, row I + column, int32."""
    shape: tuple[int, int]
    """Outputs and inputs of the weight."""
    energies_P: Tensor
    """Sum of the squared scores of each part, float64; see `part_edges`."""
    total: float
    """Sum of all squared scores; the loss with the first p parts kept is total less p energies."""
    activation_losses: list[float]
    """`trace(D H D^T)`, D the entries that are not kept, at every edge of a part, from no entry
    kept (the energy of the whole weight) to all (0)."""
    weight_losses: list[float]
    """`|D|^2` at every edge."""
    report: dict[str, float | int | str]
    """Details of the computation; `compared` is the group of entries within which scores are
    compared."""


def sort_within_rows(weight_OI: Tensor, score_OI: Tensor, statistic: InputGram) -> Sparse:
    """Sort all entries, best first, so that every prefix has the same number in each row, to within
    1.

    Entries are sorted by their place within their row (descending score; ties by column), then by
    row. Deterministic. O I log I for sorting, and `PARTS` O I^2 multiply-adds in the weight's dtype
    (at least float32) for the losses. All values and positions are stored, at 8 bytes an entry,
    since any number may be kept.

    Raises:
        InputError: The weight, the scores or the Gram contain NaN or infinity.
        ValueError: The shapes do not match, or the weight has more entries than int32 can number.
    """
    outputs, inputs = weight_OI.shape
    if score_OI.shape != weight_OI.shape or statistic.matrix_II.shape != (inputs, inputs):
        raise ValueError(
            f"scores are {tuple(score_OI.shape)} and the input Gram is "
            f"{tuple(statistic.matrix_II.shape)}; a weight of {(outputs, inputs)} needs its own "
            f"shape and {(inputs, inputs)}"
        )
    if weight_OI.numel() > 2**31:
        raise ValueError(f"the weight has {weight_OI.numel()} entries; at most 2^31 are numbered")
    for name, matrix in (("weight", weight_OI), ("score", score_OI)):
        check_finite(name, matrix)
    check_finite("input Gram", statistic.matrix_II)
    order_OI = score_OI.argsort(dim=1, descending=True, stable=True)
    starts_O1 = inputs * torch.arange(outputs, device=weight_OI.device)[:, None]
    positions_N = (order_OI + starts_O1).T.reshape(-1)
    del order_OI
    energies_P = _part_sums(score_OI, positions_N)
    weight_energies_P = _part_sums(weight_OI, positions_N)
    return Sparse(
        values_N=weight_OI.reshape(-1)[positions_N].float(),
        positions_N=positions_N.int(),
        shape=(outputs, inputs),
        energies_P=energies_P,
        total=float(energies_P.sum()),
        activation_losses=_activation_losses(weight_OI, positions_N, statistic),
        weight_losses=_tails(weight_energies_P),
        report={"compared": "row"},
    )


def part_edges(entries: int) -> list[int]:
    """Number of entries kept at the edges of the parts, from 0 to all, [P + 1]."""
    return [part * entries // PARTS for part in range(PARTS + 1)]


def _part_sums(matrix_OI: Tensor, positions_N: Tensor) -> Tensor:
    """Sum of the squared entries of each part, float64 [P]."""
    squares_N = matrix_OI.reshape(-1)[positions_N].double().square()
    edges = pairwise(part_edges(len(squares_N)))
    return torch.stack([squares_N[start:stop].sum() for start, stop in edges])


def _tails(energies_P: Tensor) -> list[float]:
    """Remainder of the sum after each number of parts, [P + 1]; summed from the end, so the last is
    0."""
    # summed on the host: the order of CUDA's cumsum of floats is not fixed
    return [*accumulate(energies_P.tolist()[::-1], initial=0.0)][::-1]


def _activation_losses(weight_OI: Tensor, positions_N: Tensor, statistic: InputGram) -> list[float]:
    """`trace(D H D^T)` at every edge; products in the weight's dtype, sums in float64."""
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    matrix_II, lost_OI = statistic.matrix_II.to(dtype), weight_OI.to(dtype, copy=True).contiguous()
    losses = []
    for start, stop in pairwise([0, *part_edges(len(positions_N))]):
        lost_OI.view(-1)[positions_N[start:stop]] = 0
        loss = torch.sum(lost_OI @ matrix_II * lost_OI, dtype=torch.float64)
        losses.append(max(float(loss), 0.0))  # rounding
    return losses
