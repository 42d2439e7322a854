"""Cost of two-sided factors, by the formulas of `linalg.two_sided`."""

from orchestrator.forecast.work import Work, eigen_side
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.methods.kinds.costs.low_rank import (
    LowRankCost,
    cutting,
    eigen,
    free_directions,
    moment,
    spanning,
)
from orchestrator.methods.kinds.costs.workspaces import two_sided
from orchestrator.plan.linear import Linear


class TwoSidedCost(LowRankCost):
    """Factors in a norm of inputs and of gradients, computed in float64 throughout."""

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        outputs, narrow = float(linear.out_features), float(eigen_side(linear))
        rank = self._rank(linear, pivoted)
        double = spanning(linear) + moment(linear, given) + self._both(linear, rank)
        double += 2.0 * outputs * narrow * rank
        return Work(double=double) + eigen(linear) + self._written(linear, rank, itemsize)

    def _both(self, linear: Linear, rank: float) -> float:
        """FLOPs of the products with both statistics, and of the factors."""
        narrow, inputs = float(eigen_side(linear)), float(linear.in_features)
        products = 7 * (2.0 * narrow**3) + 2.0 * narrow**2 * inputs
        return products + cutting(linear, rank) + 6.0 * narrow**2 * rank

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        free = free_directions(linear, given, rank)
        return self._statistics(linear, given) + two_sided(linear, rank, given.gram, free)

    def _statistics(self, linear: Linear, given: LinearStatistics) -> int:
        return super()._statistics(linear, given) + 8 * given.curvature * given.curvature
