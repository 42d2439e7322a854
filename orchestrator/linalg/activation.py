"""Mean norm of the rows that an expert adds to the residual stream, chunk by chunk.

Shape suffixes: N rows, H hidden.
"""

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
