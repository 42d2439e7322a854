"""Cost of entries alone, by `linalg.sparsity.sparse`."""

from typing import ClassVar

from orchestrator.forecast.work import Work
from orchestrator.methods.kinds.costs.base import ENTRY_BYTES, KindCost, LinearStatistics
from orchestrator.plan.linear import Linear


class SparseCost(KindCost):
    """Entries are sorted and stored, which costs no product."""

    has_entries: ClassVar[bool] = True

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        return 0

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        return Work(write=float(ENTRY_BYTES * linear.values))

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        whole, statistic = 8 * linear.values, 8 * given.gram * given.gram
        # scores, positions, the stored part of both, and in float32 the residual and its image
        return statistic + statistic // 2 + 4 * whole + whole // 2
