"""Cost of both parts of a robust PCA, by `linalg.sparsity.rpca` and `linalg.ranked`."""

from typing import ClassVar

from orchestrator.forecast.work import Work, eigen_side
from orchestrator.methods.kinds.costs.base import ENTRY_BYTES, KindCost, LinearStatistics
from orchestrator.methods.kinds.costs.low_rank import eigen
from orchestrator.methods.kinds.costs.workspaces import EIGENVECTOR_COPIES
from orchestrator.plan.linear import Linear

RPCA_ITERATIONS = 40
"""Singular value thresholdings of a weight: its steps grow by 1.5 to a tolerance of 1e-7."""
SKETCH = 128
"""Columns of a sketch of the inputs (`linalg.ranked`, which imports torch)."""


class RankedCost(KindCost):
    """Singular value thresholding, step by step; all directions and all entries are stored."""

    has_entries: ClassVar[bool] = True

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        return eigen_side(linear)

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        outputs, inputs = float(linear.out_features), float(linear.in_features)
        rank = float(self.stored_rank(linear, pivoted=pivoted))
        once = Work(double=4.0 * outputs * inputs * float(eigen_side(linear))) + eigen(linear)
        entries = Work(write=outputs * inputs * ENTRY_BYTES)
        # energies of directions and of the weight, and a sketch by a Cholesky factor of the Gram
        ranked = 2.0 * (rank + outputs + SKETCH) * inputs**2 + inputs**3 / 3
        written = Work(write=rank * (outputs + inputs) * itemsize)
        return once.times(RPCA_ITERATIONS) + Work(double=ranked) + written + entries

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        whole, statistic = 8 * linear.values, 8 * given.gram * given.gram
        # weight, L, S, the multiplier and two iterates, and a Gram's eigenvectors
        splitting = 7 * whole + (2 + EIGENVECTOR_COPIES) * 8 * eigen_side(linear) ** 2
        # factors and entries, beside the inputs' Gram scaled and its Cholesky factor
        sketching = 4 * rank * linear.rank_cost + whole + 2 * statistic
        return statistic + max(splitting, sketching)
