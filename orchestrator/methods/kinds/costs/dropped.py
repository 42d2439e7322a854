"""Cost of the saliencies of experts."""

from orchestrator.forecast.work import Work
from orchestrator.methods.kinds.costs.base import KindCost, LinearStatistics
from orchestrator.plan.linear import Linear

SALIENCY_BYTES = 8
"""Bytes of the stored saliency, a float64."""


class DroppedCost(KindCost):
    """One number is stored; nothing is computed but norms while chunks pass."""

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        return 0

    def stored_bytes(self, linear: Linear, *, pivoted: bool, itemsize: int) -> int:
        return SALIENCY_BYTES

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        return Work(write=float(SALIENCY_BYTES))

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        return SALIENCY_BYTES
