"""Costs of two factors, by the formulas of `linalg.low_rank` and `linalg.scaled`."""

from orchestrator.forecast.work import TRIANGLE, Work, eigen_side
from orchestrator.methods.kinds.costs.base import KindCost, LinearStatistics
from orchestrator.methods.kinds.costs.workspaces import one_sided
from orchestrator.plan.forms import AFFINE
from orchestrator.plan.linear import Linear


class LowRankCost(KindCost):
    """One eigendecomposition in the space of the smaller side; two factors are stored."""

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        outputs, inputs = float(linear.out_features), float(linear.in_features)
        narrow, rank = float(eigen_side(linear)), self._rank(linear, pivoted)
        check = 2.0 * outputs * rank**2 + 2.0 * narrow * rank * inputs + 2.0 * narrow * inputs**2
        double = spanning(linear) + moment(linear, given)
        work = Work(double=double, single=cutting(linear, rank) + check)
        return work + eigen(linear) + self._written(linear, rank, itemsize)

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        free = free_directions(linear, given, rank)
        return self._statistics(linear, given) + one_sided(linear, rank, given.gram, free)

    def _statistics(self, linear: Linear, given: LinearStatistics) -> int:
        """Bytes of the statistics beside a decomposition, in float64."""
        return 8 * given.gram * given.gram

    def _rank(self, linear: Linear, pivoted: bool) -> float:
        return float(self.stored_rank(linear, pivoted=pivoted))

    def _written(self, linear: Linear, rank: float, itemsize: int) -> Work:
        return Work(write=rank * (float(linear.out_features) + linear.in_features) * itemsize)


class ScaledCost(LowRankCost):
    """Factors in a norm of their own; the moment in that of the outputs is kept beside it."""

    def _statistics(self, linear: Linear, given: LinearStatistics) -> int:
        return super()._statistics(linear, given) + 8 * eigen_side(linear) ** 2


class AffineCost(LowRankCost):
    """Factors beside a bias, for which the means of inputs and outputs are stored in float64."""

    def _statistics(self, linear: Linear, given: LinearStatistics) -> int:
        """Bytes of the Gram, and of the Gram about the mean."""
        return 2 * super()._statistics(linear, given)

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        return max(AFFINE.break_even(linear), 1)

    def stored_bytes(self, linear: Linear, *, pivoted: bool, itemsize: int) -> int:
        factors = super().stored_bytes(linear, pivoted=pivoted, itemsize=itemsize)
        return factors + 8 * linear.rank_cost


def spanning(linear: Linear) -> float:
    """Return the FLOPs of an orthonormal basis of the weight's columns if O > I, else 0."""
    outputs, inputs = float(linear.out_features), float(linear.in_features)
    if outputs <= inputs:
        return 0.0
    return TRIANGLE * 2 * outputs * inputs**2 + inputs**3 / 3 + outputs * inputs**2


def moment(linear: Linear, given: LinearStatistics) -> float:
    """Return the FLOPs of the moment [K, K] by a Gram of inputs; that of outputs is at hand."""
    narrow, inputs = float(eigen_side(linear)), float(linear.in_features)
    if given.gram != linear.in_features:
        return 0.0
    return 2.0 * narrow * inputs**2 + TRIANGLE * (2.0 * narrow**3)


def cutting(linear: Linear, rank: float) -> float:
    """Return the FLOPs of both factors from the eigenvectors."""
    outputs, inputs = float(linear.out_features), float(linear.in_features)
    narrow = float(eigen_side(linear))
    turn = 2.0 * outputs * narrow * rank if outputs > inputs else 0.0
    return turn + 2.0 * narrow * rank * inputs


def eigen(linear: Linear) -> Work:
    """Return one eigendecomposition of [K, K]."""
    return Work(eigen=9.0 * float(eigen_side(linear)) ** 3)


def free_directions(linear: Linear, given: LinearStatistics, rank: int) -> int:
    """Return the number of directions that a Gram of few tokens leaves open."""
    if given.known is None or given.known >= rank:
        return 0
    return max(eigen_side(linear) - given.known, 0)
