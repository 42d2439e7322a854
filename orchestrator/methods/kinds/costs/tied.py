"""Cost of the distances of experts."""

from orchestrator.forecast.work import Work
from orchestrator.methods.kinds.costs.base import KindCost, LinearStatistics
from orchestrator.plan.linear import Linear

TOKENS_BYTES = 8
"""Bytes of the stored number of tokens, an int64."""


class TiedCost(KindCost):
    """One number is stored of a linear; outputs are summed while chunks pass."""

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        return 0

    def stored_bytes(self, linear: Linear, *, pivoted: bool, itemsize: int) -> int:
        return TOKENS_BYTES

    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        return Work(write=float(TOKENS_BYTES))

    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        return TOKENS_BYTES
