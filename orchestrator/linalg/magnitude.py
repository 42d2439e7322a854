"""The mean magnitude of what a linear reads, gathered chunk by chunk.

Shape suffixes: T tokens, I channels.
"""

from typing import Self

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite


class Magnitude:
    """Sum over the rows x it has seen of |x_j|, for every channel j, and how many there were.

    A monoid: a fresh `Magnitude(n)` is the unit, `update` adds rows, `merge` adds another. The bits
    are a function of the sequence of updates and merges alone. Sums are float64 whatever dtype the
    rows have. Lives on the device it is given, as the rows must. Costs T I additions a chunk; holds
    8 n bytes.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu"):
        self.n = n
        self.tokens = 0
        """Rows seen so far."""
        self._sum_I = torch.zeros(n, dtype=torch.float64, device=device)

    def update(self, rows_TI: Tensor) -> Self:
        """Adds rows of any floating dtype: those, and only those, that the token mask selects."""
        if rows_TI.ndim != 2 or rows_TI.shape[1] != self.n:
            raise ValueError(f"rows have shape {tuple(rows_TI.shape)}, not [tokens, {self.n}]")
        self._sum_I += rows_TI.abs().sum(dim=0, dtype=torch.float64)
        self.tokens += len(rows_TI)
        return self

    def merge(self, other: Self) -> Self:
        """Adds all that another has seen; the other stays as it is."""
        if other.n != self.n:
            raise ValueError(f"magnitudes of {other.n} channels cannot join those of {self.n}")
        self._sum_I += other._sum_I
        self.tokens += other.tokens
        return self

    def mean(self) -> Tensor:
        """Mean of |x_j| over the rows, float64 [n]; 0 before any row.

        Raises:
            InputError: It holds NaN or infinity; says in how many entries.
        """
        mean_I = self._sum_I / max(self.tokens, 1)
        check_finite(f"mean magnitude of {self.tokens} tokens", mean_I)
        return mean_I
