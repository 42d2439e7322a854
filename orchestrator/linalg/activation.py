"""Outputs of experts, accumulated chunk by chunk: the mean of their norm, and their mean.

Shape suffixes: N rows, H hidden, C channels, E experts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.linalg import vector_norm

from orchestrator.linalg.gram import check_finite


class Activation:
    """Sum of |y| over rows y in the Euclidean norm, and the number of rows.

    A monoid: `Activation()` is the unit, `update` adds rows, `merge` adds another instance. The sum
    is float64 for every dtype of the rows, on the given device, as the rows must be; its bits
    depend only on the sequence of updates and merges. Costs 2 N H operations a chunk.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        """Number of rows added so far."""
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, rows_NH: Tensor) -> Self:
        """Add rows in any floating dtype, [N, H]."""
        self._sum += vector_norm(rows_NH, dim=1, dtype=torch.float64).sum()
        self.tokens += len(rows_NH)
        return self

    def merge(self, other: Self) -> Self:
        """Add the sum of another instance, which is not changed."""
        self._sum += other._sum
        self.tokens += other.tokens
        return self

    def mean(self) -> Tensor:
        """Return the mean norm, float64 []; 0 if no row was added.

        Raises:
            InputError: It is NaN or infinite.
        """
        mean = self._sum / max(self.tokens, 1)
        check_finite(f"mean activation of {self.tokens} tokens", mean)
        return mean


class MeanRow:
    """Sum of rows [N, C], and their number.

    A monoid: `MeanRow(n)` is the unit, `update` adds rows, `merge` adds another instance. The sum
    is float64 for every dtype of the rows, on the given device, as the rows must be; its bits
    depend only on the sequence of updates and merges. Costs N C additions a chunk.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        """Number of rows added so far."""
        self._sum_C = torch.zeros(n, dtype=torch.float64, device=device)

    def update(self, rows_NC: Tensor, *, zeros: int = 0) -> Self:
        """Add rows in any floating dtype, and a number of rows of zeros."""
        self._sum_C += rows_NC.sum(dim=0, dtype=torch.float64)
        self.tokens += len(rows_NC) + zeros
        return self

    def merge(self, other: Self) -> Self:
        """Add the sum of another instance, which is not changed."""
        self._sum_C += other._sum_C
        self.tokens += other.tokens
        return self

    def mean(self) -> Tensor:
        """Return the mean row, float64 [C]; zeros if no row was added.

        Raises:
            InputError: It contains NaN or infinity.
        """
        mean_C = self._sum_C / max(self.tokens, 1)
        check_finite(f"mean output over {self.tokens} tokens", mean_C)
        return mean_C


@dataclass(frozen=True, slots=True)
class OutputDistances:
    """Statistic of an expert for merging it with others of its block."""

    distances_E: Tensor
    """Euclidean distances of its mean output from those of all experts, float64; empty if another
    linear of the expert has them."""
    tokens: int
    """Tokens that are routed to the expert."""


def distances(means_EC: Tensor, item: int) -> Tensor:
    """Return the Euclidean distances [E] of one of the rows from all."""
    found_E: Tensor = torch.linalg.vector_norm(means_EC - means_EC[item], dim=1)
    return found_E
