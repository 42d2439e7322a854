"""Interface of the cost of a kind of result.

Shape letters: O outputs, I inputs, K = min(O, I), R the rank that is stored.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.forecast.work import Work
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.linear import Linear

ENTRY_BYTES = 8
"""Bytes of a stored entry: its value in float32 and its position."""


@dataclass(frozen=True, slots=True)
class LinearStatistics:
    """Sizes of the statistics that a linear is decomposed with."""

    gram: int
    """Channels of its Gram: I, or O for a Gram of the outputs."""
    curvature: int = 0
    """Channels of the second moment of its gradients; 0 without gradients."""
    known: int | None = None
    """Largest rank that the Gram can have, the number of tokens; None if it has full rank."""


class KindCost(ABC):
    """Cost of results of one kind: what a unit stores, and what a decomposition takes.

    A linear of this interface may be a joint one, of linears that share a basis. Loaded without
    torch, like the kinds.
    """

    has_entries: ClassVar[bool] = False
    """True if a unit stores all O I entries of a weight, each with its position."""

    def stored_rank(self, linear: Linear, *, pivoted: bool) -> int:
        """Return the rank R up to which factors are stored; 0 if there are none.

        That of break-even by default; all K if factors are pivoted, which makes any rank smaller.
        """
        narrow = min(linear.out_features, linear.in_features)
        return narrow if pivoted else max(LOW_RANK.break_even(linear), 1)

    def stored_bytes(self, linear: Linear, *, pivoted: bool, itemsize: int) -> int:
        """Return the bytes of a stored result: factors, and entries with their positions.

        Args:
            itemsize: Bytes of a value of the factors.
        """
        factors = itemsize * self.stored_rank(linear, pivoted=pivoted) * linear.rank_cost
        return factors + (ENTRY_BYTES * linear.values if self.has_entries else 0)

    @abstractmethod
    def decomposing(
        self, linear: Linear, given: LinearStatistics, *, pivoted: bool, itemsize: int
    ) -> Work:
        """Return the work of one decomposition, with the bytes that are written.

        An eigendecomposition of [n, n] counts 9 n^3 as `Work.eigen`.
        """

    @abstractmethod
    def workspace(self, linear: Linear, given: LinearStatistics, rank: int) -> int:
        """Return the peak bytes of a decomposition to a rank, beside the weight.

        With the copies of the statistics that it reads, and the result.
        """
