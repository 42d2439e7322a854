"""The mean cosine between two streams of vectors, gathered chunk by chunk.

Shape suffixes: T tokens, C channels.
"""

from typing import Self

import torch
from torch import Tensor


class Cosine:
    """Sum over tokens of <a, b> / (|a| |b|), and how many there were.

    A monoid: `Cosine()` is its unit, `update` adds tokens, `merge` adds another. Products are
    float32, or float64 for float64 rows; the sum over tokens is float64. A token of which one
    vector is zero counts as cosine 0. Costs 3 T C multiply-adds.
    """

    def __init__(self) -> None:
        self.sum = 0.0
        self.tokens = 0

    def update(self, before_TC: Tensor, after_TC: Tensor) -> Self:
        """Adds the cosines of corresponding rows."""
        dtype = torch.promote_types(before_TC.dtype, torch.float32)
        before_TC, after_TC = before_TC.to(dtype), after_TC.to(dtype)
        dot_T = (before_TC * after_TC).sum(dim=-1)
        norms_T = before_TC.norm(dim=-1) * after_TC.norm(dim=-1)
        cosine_T = torch.where(norms_T > 0, dot_T / norms_T, 0.0)
        self.sum += float(cosine_T.double().sum())
        self.tokens += len(before_TC)
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another has seen."""
        self.sum += other.sum
        self.tokens += other.tokens
        return self

    @property
    def mean(self) -> float:
        """The mean cosine; 0 before any token."""
        return self.sum / self.tokens if self.tokens else 0.0
