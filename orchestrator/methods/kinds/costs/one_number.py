"""Cost of results that are one number for each linear."""

from orchestrator.forecast.work import Work
from orchestrator.methods.kinds.costs.base import KindCost, LinearStatistics
from orchestrator.plan.linear import Linear

NUMBER_BYTES = 8
"""Bytes of the stored number: a saliency in float64, or a number of tokens in int64."""


class OneNumberCost(KindCost):
    """The number is stored; its computation is that of the passes."""

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        return 0

    def stored_bytes(self, linear: Linear, *, pivoted: bool, itemsize: int) -> int:
        return NUMBER_BYTES

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        return Work(write=float(NUMBER_BYTES))

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        return NUMBER_BYTES
