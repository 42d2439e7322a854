"""Sums of the inputs of a linear by groups of sequences, accumulated chunk by chunk.

Shape suffixes: T tokens, G groups, I channels.
"""

from typing import Self

import torch
from torch import Tensor

from orchestrator.linalg.gram import check_finite


class GroupSums:
    """Sum of rows x and their number, for every group of consecutive sequences.

    A monoid: `GroupSums(n)` is the unit, `update` adds rows, `merge` adds another instance. The
    bits depend only on the sequence of updates and merges. Sums are float64 for every dtype of the
    rows and are on the given device, as the rows must be. Costs T I additions a chunk; holds 8 G I
    bytes.

    Args:
        n: Channels.
        size: Sequences of a group; sequence s is in group s // size.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu", *, size: int) -> None:
        self.n, self.size = n, size
        self._device = device
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def update(self, rows_TI: Tensor, sequence: int) -> Self:
        """Add the rows of a sequence, in any floating dtype.

        Raises:
            ValueError: The rows have another number of channels.
        """
        if rows_TI.ndim != 2 or rows_TI.shape[1] != self.n:
            raise ValueError(f"rows have shape {tuple(rows_TI.shape)}, not [tokens, {self.n}]")
        return self._add(
            sequence // self.size, rows_TI.sum(dim=0, dtype=torch.float64), len(rows_TI)
        )

    def merge(self, other: Self) -> Self:
        """Add the sums of another instance, which is not changed."""
        if (other.n, other.size) != (self.n, self.size):
            raise ValueError(
                f"groups of {other.size} x {other.n} cannot join {self.size} x {self.n}"
            )
        for group, sum_I in other._sums.items():
            self._add(group, sum_I, other._tokens[group])
        return self

    def _add(self, group: int, sum_I: Tensor, tokens: int) -> Self:
        empty = torch.zeros(self.n, dtype=torch.float64, device=self._device)
        self._sums[group] = self._sums.get(group, empty) + sum_I
        self._tokens[group] = self._tokens.get(group, 0) + tokens
        return self

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums [G, I] and the numbers of rows [G] of groups with rows, float64.

        Raises:
            InputError: A sum is NaN or infinite.
        """
        groups = [group for group in sorted(self._sums) if self._tokens[group]]
        empty = torch.zeros(0, self.n, dtype=torch.float64, device=self._device)
        sums_GI = torch.stack([self._sums[group] for group in groups]) if groups else empty
        check_finite(f"sum of the inputs of {sum(self._tokens.values())} tokens", sums_GI)
        tokens_G = sums_GI.new_tensor([float(self._tokens[group]) for group in groups])
        return sums_GI, tokens_G
