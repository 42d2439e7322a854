"""Work of a run: FLOPs by kind, and bytes, stage by stage.

A multiply-add counts two. Shape letters as in `memory`; an eigendecomposition of [n, n] counts
9 n^3, which is what its rate is stated in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.forecast.memory import stored_rank
from orchestrator.forecast.needs import Needs, curvature_channels, gram_of, input_grams
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.shapes import Shapes
from orchestrator.plan.linear import Linear

TRIANGLE = 0.6
"""Fraction of a symmetric product's FLOPs that are computed (see `linalg.gram`)."""
DRIFT_FLOPS = 4.4
"""FLOPs of the moments of two streams, by token and squared channel (`linalg.compensate`)."""
RPCA_ITERATIONS = 40
"""Singular value thresholdings of a weight: its steps grow by 1.5 to a tolerance of 1e-7."""
SKETCH = 128
"""Columns of a sketch of the inputs (`linalg.ranked`, which imports torch)."""


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
    return 2.0 * tokens * shapes.block_values + 4.0 * tokens * tokens * shapes.attention


def gathering(shapes: Shapes, needs: Needs, tokens: int, itemsize: int) -> Work:
    """One sequence through one block, with its statistics; of a backward pass, one label.

    A pass back computes the block again and brings gradients to its inputs, not to its weights.
    """
    linears = shapes.heaviest
    sizes = input_grams(linears, needs)
    sites = {each.site for each in linears}
    total = computed(forward_flops(shapes, tokens), itemsize).times(2 if needs.labels else 1)

    def as_passed(flops: float) -> Work:
        """Products of values of the pass, in its dtype, with results in float32."""
        return Work(tf32=flops) if itemsize < 4 else Work(single=flops)

    def gram(channels: int) -> float:
        return TRIANGLE * 2.0 * tokens * channels * channels

    for source, channels in sizes.items():
        total += as_passed(gram(channels)) if source in sites else Work(single=gram(channels))
    for linear in linears:
        product = as_passed(2.0 * tokens * linear.values)
        if gram_of(linear, sizes) != linear.site and itemsize < 4:
            total += product
        if needs.labels and is_turned(linear, needs):
            total += product + Work(single=gram(curvature_channels(linear, needs)))
        elif needs.labels:
            total += as_passed(gram(curvature_channels(linear, needs)))
    return total


def is_turned(linear: Linear, needs: Needs) -> bool:
    """True if gradients are mapped to the inputs' side for their second moment."""
    return linear.out_features > linear.in_features and not needs.wide_curvature


def eigen_side(linear: Linear) -> int:
    """Rows of the largest matrix that a method eigendecomposes for a linear.

    All methods work in the space of the weight's rows or of its columns, whichever is smaller.
    """
    return min(linear.out_features, linear.in_features)


def decomposing(linear: Linear, needs: Needs, side: int, *, pivoted: bool, itemsize: int) -> Work:
    """Decomposition of one linear and writing of its factors, by the formulas of `linalg`."""
    outputs, inputs = float(linear.out_features), float(linear.in_features)
    narrow = float(eigen_side(linear))
    rank = float(stored_rank(linear, needs, pivoted))
    written = Work(write=rank * (outputs + inputs) * itemsize)
    square = 2.0 * narrow**3
    eigen = Work(eigen=9.0 * narrow**3)
    if needs.kind == "sparse":
        return Work(write=outputs * inputs * 8)
    if needs.kind == "rpca":
        once = Work(double=4.0 * outputs * inputs * narrow) + eigen
        entries = Work(write=outputs * inputs * 8)
        # energies of directions and of the weight, and a sketch by a Cholesky factor of the Gram
        ranked = 2.0 * (rank + outputs + SKETCH) * inputs**2 + inputs**3 / 3
        return once.times(RPCA_ITERATIONS) + Work(double=ranked) + written + entries
    basis = 0.0
    if outputs > inputs:
        basis = TRIANGLE * 2 * outputs * inputs**2 + inputs**3 / 3 + outputs * inputs**2
    moment = 2.0 * narrow * inputs**2 + TRIANGLE * square if side == linear.in_features else 0.0
    turn = 2.0 * outputs * narrow * rank if outputs > inputs else 0.0
    cut = turn + 2.0 * narrow * rank * inputs
    check = 2.0 * outputs * rank**2 + 2.0 * narrow * rank * inputs + 2.0 * narrow * inputs**2
    if needs.kind == "low_rank":
        return Work(double=basis + moment, single=cut + check) + eigen + written
    both = 7 * square + 2.0 * narrow**2 * inputs + cut + 6.0 * narrow**2 * rank
    whole = Work(double=basis + moment + both + 2.0 * outputs * narrow * rank) + eigen + written
    if needs.kind == "two_sided_sparse":
        # entries against factors on a grid of eight densities, each an eigendecomposition
        return whole + (Work(double=both) + eigen).times(8)
    return whole


def decomposing_block(
    linears: Sequence[Linear], needs: Needs, pivoted: bool, itemsize: int
) -> Work:
    """All linears of a block."""
    grams = input_grams(linears, needs)
    total = Work()
    for linear in linears:
        whole, side = needs.stacked(linear), grams[gram_of(linear, grams)]
        part = linear.out_features / whole.out_features
        total += decomposing(whole, needs, side, pivoted=pivoted, itemsize=itemsize).times(part)
    return total


def pivoting(linear: Linear, rank: float) -> Work:
    """Brings one linear's factors of a rank to pivoted storage; no byte.

    By the formulas of `linalg.pivot`; exchanges after the elimination, each a pass over the
    coefficients, are not counted.
    """
    outputs, inputs = float(linear.out_features), float(linear.in_features)
    others = outputs - rank
    basis = 4 * outputs * rank**2 - 4 / 3 * rank**3
    eliminated = outputs * rank**2 - rank**3 / 3
    solved = 2 * (2 / 3 * rank**3 + 2 * others * rank**2)
    rows = 2 * rank**2 * inputs
    checked = 2 * (outputs + others) * rank * inputs
    return Work(double=basis + eliminated + solved + rows + checked)


def trained(shapes: Shapes, kept: float, tokens: int) -> float:
    """FLOPs of one sequence through one block of factors, forward and back."""
    return 6.0 * tokens * kept_values(shapes, kept) + 12.0 * tokens * tokens * shapes.attention


def kept_values(shapes: Shapes, kept: float) -> float:
    """Kept values of a block, with those that are not targeted."""
    targeted = sum(each.values for each in shapes.heaviest)
    return shapes.block_values - (1 - kept) * targeted
