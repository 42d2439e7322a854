"""Work: FLOPs by the rate that they go at, and bytes; formulas of a block's passes.

A multiply-add counts two; an eigendecomposition of [n, n] counts 9 n^3, which is what its rate is
stated in.
"""

import math
from dataclasses import dataclass

from orchestrator.forecast.rates import Rates
from orchestrator.forecast.shapes import Shapes
from orchestrator.plan.linear import Linear

TRIANGLE = 0.6
"""Fraction of a symmetric product's FLOPs that are computed (see `linalg.gram`)."""
DRIFT_FLOPS = 4.4
"""FLOPs of the moments of two streams, by token and squared channel (`linalg.compensate`)."""


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs by the rate that they go at, and bytes."""

    half: float = 0.0
    tf32: float = 0.0
    single: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    read: float = 0.0
    write: float = 0.0
    network: float = 0.0

    @property
    def flops(self) -> float:
        return self.half + self.tf32 + self.single + self.double + self.eigen

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, n) + getattr(other, n) for n in _NAMES))

    def times(self, factor: float) -> "Work":
        return Work(*(getattr(self, name) * factor for name in _NAMES))

    def seconds(self, rates: Rates) -> float:
        """Seconds on one worker if nothing overlaps."""
        return math.fsum(getattr(self, name) / getattr(rates, name) for name in _NAMES)

    def overlapped(self, rates: Rates) -> float:
        """Seconds on one worker whose writing overlaps with the next computation."""
        written = self.write / rates.write
        return max(written, self.seconds(rates) - written)


_NAMES = ("half", "tf32", "single", "double", "eigen", "read", "write", "network")


def computed(flops: float, itemsize: int) -> Work:
    """Products of a pass, by the item size of its dtype."""
    if itemsize < 4:
        return Work(half=flops)
    return Work(single=flops) if itemsize == 4 else Work(double=flops)


def forward_flops(shapes: Shapes, tokens: int) -> float:
    """FLOPs of one sequence through one block."""
    used = shapes.block_values - shapes.idle_values
    return 2.0 * tokens * used + 4.0 * tokens * tokens * shapes.attention


def eigen_side(linear: Linear) -> int:
    """Rows of the largest matrix that a method eigendecomposes for a linear.

    All methods work in the space of the weight's rows or of its columns, whichever is smaller.
    """
    return min(linear.out_features, linear.in_features)


def trained(shapes: Shapes, kept: float, tokens: int) -> float:
    """FLOPs of one sequence through one block of factors, forward and back."""
    used = kept_values(shapes, kept) - kept * shapes.idle_values
    return 6.0 * tokens * used + 12.0 * tokens * tokens * shapes.attention


def kept_values(shapes: Shapes, kept: float) -> float:
    """Kept values of a block, with those that are not targeted."""
    targeted = sum(each.values for each in shapes.heaviest)
    return shapes.block_values - (1 - kept) * targeted
