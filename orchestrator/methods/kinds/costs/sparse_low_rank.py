"""Cost of entries with two-sided factors beside them, by `linalg.sparsity.two_sided_sparse`."""

from typing import ClassVar

from orchestrator.forecast.work import Work
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.methods.kinds.costs.low_rank import eigen
from orchestrator.methods.kinds.costs.two_sided import TwoSidedCost
from orchestrator.plan.linear import Linear

DENSITIES = 8
"""Densities of entries that are counted; each takes an eigendecomposition of the rest."""


class SparseLowRankCost(TwoSidedCost):
    """A two-sided decomposition, and one more for the rest beside the entries of each density."""

    has_entries: ClassVar[bool] = True

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        whole = super().decomposing(linear, given, pivoted=pivoted, itemsize=itemsize)
        both = self._both(linear, self._rank(linear, pivoted))
        return whole + (Work(double=both) + eigen(linear)).times(DENSITIES)

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        working = super().workspace(linear, given, rank)
        # entries, their order, the damped curvature, and the correlations of both sides
        working += 4 * (8 * linear.values)
        return working + 9 * given.curvature**2 + linear.in_features**2
