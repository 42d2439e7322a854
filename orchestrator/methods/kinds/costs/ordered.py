"""Cost of directions in the order of an importance, by `linalg.gradients` and `linalg.scaled`."""

from orchestrator.forecast.work import Work, eigen_side
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.methods.kinds.costs.low_rank import LowRankCost, eigen
from orchestrator.plan.linear import Linear


class OrderedCost(LowRankCost):
    """The basis of the weight, whose gradients are gathered, and factors in it."""

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        """Return the work with that of the basis, which a worker computes at the first chunk."""
        outputs, inputs = float(linear.out_features), float(linear.in_features)
        narrow, rank = float(eigen_side(linear)), self._rank(linear, pivoted)
        double = 2.0 * outputs * inputs * narrow + 2.0 * outputs * inputs * rank
        double += 2.0 * (rank + outputs) * float(given.gram) ** 2
        if outputs > inputs:
            # the basis of the outputs by Householder reflections
            double += 2.0 * outputs * inputs * narrow + 4.0 * outputs * narrow**2
        return Work(double=double) + eigen(linear) + self._written(linear, rank, itemsize)

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        outputs, inputs, narrow = linear.out_features, linear.in_features, eigen_side(linear)
        whole, square = 8 * linear.values, 8 * narrow * narrow
        is_tall = outputs > inputs
        # the weight in float64 and in its basis, or that, its orthonormal columns and R
        finding = 2 * whole + square if is_tall else 0
        # directions in order, the weight and a factor in float64; the other factor
        cutting = (whole if is_tall else 0) + 12 * outputs * rank + whole + 8 * inputs * rank
        # both factors, and products with the Gram: of the weight, or of the rows of a factor
        factors, rows = 4 * rank * linear.rank_cost, 3 * 8 * rank * given.gram
        whole_image = 2 * whole if given.gram == inputs else 0
        explaining = factors + max(whole_image, rows)
        return self._statistics(linear, given) + max(finding, cutting, explaining)

    def _statistics(self, linear: Linear, given: LinearStatistics) -> int:
        return super()._statistics(linear, given) + 8 * eigen_side(linear) ** 2
