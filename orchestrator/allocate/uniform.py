"""The same kept fraction for every linear: the allocation of SVD-LLM (arXiv 2403.07378)."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from orchestrator.allocate.budget import assign_rank, budget_values, make_plan
from orchestrator.errors import InfeasibleError
from orchestrator.plan import Curve, Linear, Plan


def uniform(linears: Sequence[Linear], curves: Mapping[str, Curve], keep: float) -> Plan:
    """Rank floor(keep · m n / (m + n)) for each m × n linear; the curves are not looked at.

    The floors leave less than one rank a linear unused; it is reported as slack and not given to
    anyone, because the published figures are for exactly these ranks.

    Raises:
        UsageError, InfeasibleError: As `budget_values`; also when a single linear's share is below
            rank 1, with its name.
    """
    del curves
    budget = budget_values(linears, keep)
    fraction = Fraction(str(keep))
    assignments = {}
    for linear in linears:
        share = math.floor(fraction * linear.values)
        rank = share // linear.rank_cost
        if share < linear.values and min(rank, linear.break_even - 1) < 1:
            raise InfeasibleError(
                f"{linear.name}: {keep} of a {linear.out_features} x {linear.in_features} weight "
                f"is below rank 1, which stores {linear.rank_cost} of {linear.values} values; "
                "keep more, or leave it out with --ignore"
            )
        assignments[linear.name] = assign_rank(linear, rank, share)
    return make_plan(linears, assignments, budget)
