"""R rows of a weight of rank R, and its other rows as combinations of those."""

import math

from orchestrator.plan.forms.base import Cut, Form, Ranks
from orchestrator.plan.linear import Linear

PIVOT_BYTES = 4
"""Bytes of the position of one output among the pivots and the others, an int32."""


class PivotedForm(Form):
    """Pivots [R, I] and combinations [O - R, R]: R^2 values fewer than two plain factors.

    Saves values at every rank below min(O, I). Each rank adds fewer values than the one before.
    """

    name = "pivoted"
    title = "low-rank, pivoted"
    module = "orchestrator.models.forms.pivoted:PivotedLinear"
    has_rank = True
    has_fixed_price = False

    def values(self, linear: Linear, cut: Cut) -> int:
        return self.factor_values(linear, cut.rank)

    def index_bytes(self, linear: Linear, cut: Cut) -> int:
        """Bytes of the order of the outputs."""
        return PIVOT_BYTES * linear.out_features

    def factor_values(self, linear: Linear, rank: Ranks) -> Ranks:
        """Number of values of factors of this rank, R (O + I) - R^2."""
        found: Ranks = rank * linear.rank_cost - rank * rank
        return found

    def break_even(self, linear: Linear) -> int:
        """Smallest rank whose factors save nothing, min(O, I)."""
        return min(linear.out_features, linear.in_features)

    def rank_within(self, linear: Linear, values: int) -> int:
        """Largest rank whose factors store at most `values`, themselves at most the dense ones.

        (O + I - 2 R)^2 is then at least (O + I)^2 - 4 values.
        """
        least = linear.rank_cost**2 - 4 * values
        root = math.isqrt(least - 1) + 1 if least > 0 else 0
        return (linear.rank_cost - root) // 2


PIVOTED = PivotedForm()
