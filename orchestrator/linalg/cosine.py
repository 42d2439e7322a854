"""The mean cosine between two streams of vectors, gathered chunk by chunk.

Shape suffixes: T tokens, C channels.
"""

from typing import Self

import torch
from torch import Tensor
from torch.linalg import vector_norm as norm


class Cosine:
    """Sum over tokens of the cosine of a and b, and how many there were.

    By the law of cosines, with the three norms alone:

        1 - cos(a, b) = (|b - a|^2 - (|b| - |a|)^2) / (2 |a| |b|)

    which on a CPU takes half the time of <a, b>, and keeps its digits where a and b are close, as
    they are around a sublayer. Where their lengths differ by a factor f the error is f roundings.

    A monoid: `Cosine()` is its unit, `update` adds tokens, `merge` adds another. Products are
    float32, or float64 for float64 rows; the sum over tokens is float64. A token of which one
    vector is zero counts as cosine 0. Costs 3 T C multiply-adds.
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self.tokens = 0

    def update(self, before_TC: Tensor, after_TC: Tensor) -> Self:
        """Adds the cosines of corresponding rows."""
        dtype = torch.promote_types(before_TC.dtype, torch.float32)
        before_TC, after_TC = before_TC.to(dtype), after_TC.to(dtype)
        before_T, after_T = norm(before_TC, dim=-1), norm(after_TC, dim=-1)
        apart_T, longer_T = norm(after_TC - before_TC, dim=-1), after_T - before_T
        product_T = before_T * after_T
        gap_T = (apart_T - longer_T) * (apart_T + longer_T) / (2 * product_T)
        cosine_T = torch.where(product_T > 0, 1 - gap_T, 0.0)
        # not yet a number: on a GPU reading it would wait for everything before it
        self._sum = self._sum + cosine_T.sum(dtype=torch.float64)
        self.tokens += len(before_TC)
        return self

    def merge(self, other: Self) -> Self:
        """Adds what another has seen."""
        self._sum = self._sum + other._sum
        self.tokens += other.tokens
        return self

    @property
    def mean(self) -> float:
        """The mean cosine; 0 before any token."""
        return float(self._sum) / self.tokens if self.tokens else 0.0
