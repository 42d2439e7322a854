"""Ranks that an allocation may choose from: multiples of a number that cost less than dense."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.plan.cost import VALUES, Cost
from orchestrator.plan.forms import LOW_RANK, Form
from orchestrator.plan.forms.base import Ranks
from orchestrator.plan.linear import Linear

Multiple = int | Literal["auto"]
"""A number, or `auto`: by the width of the linear."""
SMALL, LARGE, WIDE = 16, 64, 2048
"""Automatic multiples: `SMALL` below the width `WIDE`, `LARGE` from there."""
FEWEST = 16
"""Steps into which an automatic multiple divides the width of a linear, at least."""


def automatic_multiple(width: int) -> int:
    """Return the automatic multiple for the smaller width of a linear; see `AllowedRanks`."""
    found = LARGE if width >= WIDE else SMALL
    while found > 1 and found * FEWEST > width:
        found //= 2
    return found


@dataclass(frozen=True, slots=True)
class AllowedRanks:
    """Ranks N, 2 N, 3 N, ... below the break-even rank of a form, by linear; beside them is dense.

    Matrix products are fast in tiles: with 1490 inner values the products of a linear [5632, 2048]
    took 1.14 times as long as with 1488 (1,024 tokens, float32, one thread; at 256 tokens 0.95).
    Multiples of N make both products of a linear [O, I] whole tiles. A pivoted linear also has
    O - R other rows, a multiple of N if O is one.

    The automatic N is 16 for a smaller width W = min(O, I) below 2048, and 64 from there. It is
    halved until it is at most W / 16, so that the ranks up to W are at least 16 steps: 8 for a
    width of 128, 4 for 64, and every rank below 32.

    A linear whose break-even rank is at most N has no allowed rank and stays dense; with the
    automatic N there is none such.

    Of another cost than values, only ranks that cost less than the dense weight are allowed: the
    first ones, since costs do not fall with the rank. A linear that has none stays dense.
    """

    form: Form = LOW_RANK
    """Form of the linears that are cut; it has ranks."""
    multiple: Multiple = 1
    cost: Cost = VALUES
    """Cost that is compared with that of the dense weight."""

    @property
    def smallest(self) -> str:
        """Name of the smallest allowed rank in a message."""
        return "rank 1" if self.multiple == 1 else f"a rank with rank_multiple {self.multiple}"

    def step(self, linear: Linear) -> int:
        """Return N for this linear."""
        if self.multiple != "auto":
            return self.multiple
        return automatic_multiple(min(linear.out_features, linear.in_features))

    def count(self, linear: Linear) -> int:
        """Return the number of allowed ranks."""
        found = max(self.form.break_even(linear) - 1, 0) // self.step(linear)
        if self.cost is VALUES:
            return found
        costs = self.price(linear, self._multiples(linear, found))
        return int(np.searchsorted(costs, self.cost.dense(linear)))

    def of(self, linear: Linear) -> np.ndarray:
        """Return the allowed ranks, ascending, int64."""
        return self._multiples(linear, self.count(linear))

    def price(self, linear: Linear, rank: Ranks) -> Ranks:
        """Return the cost of a rank, or of many, int64."""
        return self.cost.factors(linear, self.form, rank)

    def within(self, linear: Linear, cost: int) -> int:
        """Return the largest allowed rank whose factors cost at most `cost`; 0 if none does."""
        if self.cost is not VALUES:
            costs = self.price(linear, self.of(linear))
            return int(np.searchsorted(costs, cost, side="right")) * self.step(linear)
        fits = self.form.rank_within(linear, min(cost, linear.values))
        return min(fits // self.step(linear), self.count(linear)) * self.step(linear)

    def least_cost(self, linear: Linear) -> int:
        """Return the cost of the smallest allowed rank, or of the dense weight if none is."""
        if self.cost is VALUES and self.step(linear) == 1:
            return self.form.least_values(linear)
        if self.count(linear):
            return self.price(linear, self.step(linear))
        return self.cost.dense(linear)

    def _multiples(self, linear: Linear, count: int) -> np.ndarray:
        return self.step(linear) * np.arange(1, count + 1, dtype=np.int64)
