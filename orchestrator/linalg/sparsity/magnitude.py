"""Mean magnitude of the inputs of a linear, accumulated chunk by chunk.

Shape suffixes: T tokens, I channels.
"""

from typing import Self

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite


class Magnitude:
    """Sum of |x_j| over rows x, for every channel j, and the number of rows.

    A monoid: `Magnitude(n)` is the unit, `update` adds rows, `merge` adds another instance. The
    bits depend only on the sequence of updates and merges. Sums are float64 for every dtype of the
    rows and are on the given device, as the rows must be. Costs T I additions a chunk; holds 8 n
    bytes.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu"):
        self.n = n
        self.tokens = 0
        """Number of rows added so far."""
        self._sum_I = torch.zeros(n, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, sum_I: Tensor, tokens: int) -> Self:
        """Return the instance whose sum and number of rows these are."""
        magnitude = cls(0)
        magnitude.n, magnitude.tokens, magnitude._sum_I = len(sum_I), tokens, sum_I
        return magnitude

    def sum(self) -> Tensor:
        """Sum of |x_j| over the rows, float64 [n]."""
        return self._sum_I

    def update(self, rows_TI: Tensor) -> Self:
        """Add the rows selected by the token mask, in any floating dtype."""
        if rows_TI.ndim != 2 or rows_TI.shape[1] != self.n:
            raise ValueError(f"rows have shape {tuple(rows_TI.shape)}, not [tokens, {self.n}]")
        self._sum_I += rows_TI.abs().sum(dim=0, dtype=torch.float64)
        self.tokens += len(rows_TI)
        return self

    def merge(self, other: Self) -> Self:
        """Add the sums of another instance, which is not changed."""
        if other.n != self.n:
            raise ValueError(f"magnitudes of {other.n} channels cannot join those of {self.n}")
        self._sum_I += other._sum_I
        self.tokens += other.tokens
        return self

    def mean(self) -> Tensor:
        """Mean of |x_j| over the rows, float64 [n]; 0 if no row was added.

        Raises:
            InputError: It contains NaN or infinity; the message gives the number of entries.
        """
        mean_I = self._sum_I / max(self.tokens, 1)
        check_finite(f"mean magnitude of {self.tokens} tokens", mean_I)
        return mean_I
