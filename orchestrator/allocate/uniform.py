"""The same kept fraction for every linear: the allocation of SVD-LLM (arXiv 2403.07378)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.allocate.budget import assign_rank, budget_values, make_plan, share_values
from orchestrator.errors import InfeasibleError
from orchestrator.plan import Curve, Linear, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Rank floor(keep · m n / (m + n)) for each m × n linear; the curves are not looked at.

    The floors leave less than one rank a linear unused; it is reported as slack and not given to
    anyone, because the published figures are for exactly these ranks.
    """

    needs_cosines: ClassVar[bool] = False

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        keep: float,
        cosines: Mapping[str, float],
    ) -> Plan:
        """
        Raises:
            UsageError, InfeasibleError: As `budget_values`; also when a single linear's share is
                below rank 1, with its name.
        """
        budget = budget_values(linears, keep)
        assignments = {}
        for linear in linears:
            share = share_values([linear], keep)
            rank = share // linear.rank_cost
            if share < linear.values and min(rank, linear.break_even - 1) < 1:
                raise InfeasibleError(
                    f"{linear.name}: {keep} of a {linear.out_features} x {linear.in_features} "
                    f"weight is below rank 1, which stores {linear.rank_cost} of {linear.values} "
                    "values; keep more, or leave it out with --ignore"
                )
            assignments[linear.name] = assign_rank(linear, rank, share)
        return make_plan(linears, assignments, budget)
