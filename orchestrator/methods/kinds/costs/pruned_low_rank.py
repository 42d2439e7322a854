"""Cost of factors of a pruned weight, by `linalg.sparsity.pruned_low_rank`."""

from orchestrator.forecast.work import Work, eigen_side
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.methods.kinds.costs.low_rank import LowRankCost, eigen
from orchestrator.plan.linear import Linear

SORTED_BYTES = 25
"""Bytes of an entry while scores are sorted: a score twice, its position twice, and the mask."""
SCALED_BYTES = 8
"""Bytes of an entry beside a decomposition: its score, and the pruned value, scaled."""


class PrunedCost(LowRankCost):
    """A decomposition of the pruned weight, the spectra of both weights, and errors against W.

    A bit of the mask is stored for each entry.
    """

    def stored_bytes(self, linear: Linear, *, pivoted: bool, itemsize: int) -> int:
        factors = super().stored_bytes(linear, pivoted=pivoted, itemsize=itemsize)
        return factors + mask_bytes(linear)

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        outputs, inputs = float(linear.out_features), float(linear.in_features)
        narrow, rank = float(eigen_side(linear)), self._rank(linear, pivoted)
        squares = 2 * (2.0 * outputs * inputs * narrow)
        errors = 2.0 * (rank + outputs) * inputs**2 + 8.0 * rank * outputs * inputs
        once = super().decomposing(linear, given, pivoted=pivoted, itemsize=itemsize)
        written = Work(write=float(mask_bytes(linear)))
        return once + Work(double=squares + errors) + eigen(linear).times(2) + written

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        """Take the largest of three steps: scores sorted, factors made, errors against W."""
        outputs, inputs, square = linear.out_features, linear.in_features, eigen_side(linear) ** 2
        making = super().workspace(linear, given, rank) + SCALED_BYTES * linear.values + 8 * square
        making += mask_bytes(linear)
        # both factors twice in float32 and once in float64, images of the right one and of W
        factors = 4 * rank * (2 * outputs + inputs) + 8 * rank * linear.rank_cost
        images = 8 * rank * (inputs + 2 * outputs) + 24 * rank * rank + 16 * linear.values
        errors = factors + images + 4 * linear.values + mask_bytes(linear)
        least = self._statistics(linear, given)
        return max(making, least + SORTED_BYTES * linear.values, least + errors)


def mask_bytes(linear: Linear) -> int:
    """Return the bytes of a mask of the weight, eight entries to a byte."""
    return -(-linear.values // 8)
