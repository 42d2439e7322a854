"""The budget, its lower limit, and the plan that results from an allocation."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan


def share_values(linears: Sequence[Linear], keep: float) -> int:
    """Return the kept fraction of the dense values of these linears, `floor(keep * dense values)`.

    `keep` is interpreted as its decimal representation: 0.3 of 10 values is 3, not 2.
    """
    return math.floor(Fraction(str(keep)) * sum(linear.values for linear in linears))


def least_values(linear: Linear, form: Form = "low_rank") -> int:
    """Return the fewest values that this linear can store in a form.

    Rank 1, or the dense weight if that is not larger; one entry if the form is sparse.
    """
    if form == "sparse":
        return 1
    return linear.factor_values(1) if linear.break_even > 1 else linear.values


def budget_values(linears: Sequence[Linear], keep: float, form: Form = "low_rank") -> int:
    """Return the number of values that these linears may store together.

    Raises:
        UsageError: `keep` is outside (0, 1].
        InfeasibleError: Rank 1 for every linear, or one entry if the form is sparse, stores more.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep: {keep} is outside (0, 1]; 0.8 keeps four of five values")
    dense = sum(linear.values for linear in linears)
    budget = share_values(linears, keep)
    least = sum(least_values(linear, form) for linear in linears)
    if budget < least:
        what = "one entry" if form == "sparse" else "rank 1"
        raise InfeasibleError(
            f"keep: {keep} allows {budget} of {dense} values, but {what} for each of "
            f"{len(linears)} linears stores {least}; the least possible is "
            f"{math.ceil(1e6 * least / dense) / 1e6}"
        )
    return budget


def assign_rank(linear: Linear, rank: int, values: int) -> Assignment:
    """Assign this rank, limited by break-even.

    At break-even and above, factors do not save values: the linear stays dense if `values` holds
    the dense weight, and otherwise gets the last rank below break-even.
    """
    if rank < linear.break_even:
        return Assignment(form=linear.factored, rank=rank)
    if values >= linear.values:
        return Assignment(form="dense")
    return Assignment(form=linear.factored, rank=linear.break_even - 1)


def make_plan(
    linears: Sequence[Linear], assignments: Mapping[str, Assignment], budget: int
) -> Plan:
    """Make the plan in the order of the linears, with its total; the caller ensures the budget."""
    assignments = {linear.name: assignments[linear.name] for linear in linears}
    stored = sum(assignments[linear.name].stored_values(linear) for linear in linears)
    assert stored <= budget, f"stored {stored} values of a budget of {budget}"
    return Plan(assignments=assignments, budget_values=budget, stored_values=stored)


def by_role(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """Group the linears by role, in their order."""
    types: dict[str, list[Linear]] = {}
    for linear in linears:
        types.setdefault(linear.role, []).append(linear)
    return types
