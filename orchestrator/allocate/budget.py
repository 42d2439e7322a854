"""The budget: what may be stored, the least that any plan stores, and the plan that results."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.forms import LOW_RANK, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan


def share_values(linears: Sequence[Linear], keep: float) -> int:
    """The kept fraction of the dense values of these linears, `floor(keep * dense values)`.

    `keep` is taken as the decimal it was written as, so that 0.3 of 10 values is 3 and not 2.
    """
    return math.floor(Fraction(str(keep)) * sum(linear.values for linear in linears))


def budget_values(linears: Sequence[Linear], keep: float, form: Form = LOW_RANK) -> int:
    """The values that these linears may store together, their share.

    Raises:
        UsageError: `keep` is not above 0 and at most 1.
        InfeasibleError: Rank 1 everywhere, or one entry where the form is sparse, stores more.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep: {keep} is outside (0, 1]; 0.8 keeps four values in five")
    dense = sum(linear.values for linear in linears)
    budget = share_values(linears, keep)
    least = sum(map(form.least_values, linears))
    if budget < least:
        what = "rank 1" if form.has_rank else "one entry"
        raise InfeasibleError(
            f"keep: {keep} allows {budget} of {dense} values, but {what} for each of "
            f"{len(linears)} linears stores {least}; the least possible is "
            f"{math.ceil(1e6 * least / dense) / 1e6}"
        )
    return budget


def assign_rank(linear: Linear, rank: int, values: int, form: Form) -> Assignment:
    """Factors of this rank, or what break-even says.

    At break-even and above factors save nothing: the linear stays dense if its share of `values`
    holds the dense weight, and takes the last rank below break-even otherwise.
    """
    break_even = form.break_even(linear)
    if rank < break_even:
        return Assignment(form=form.name, rank=rank)
    if values >= linear.values:
        return Assignment(form="dense")
    return Assignment(form=form.name, rank=break_even - 1)


def make_plan(
    linears: Sequence[Linear], assignments: Mapping[str, Assignment], budget: int
) -> Plan:
    """The plan in the order of the linears, with its total; the caller has kept the budget."""
    assignments = {linear.name: assignments[linear.name] for linear in linears}
    stored = sum(assignments[linear.name].stored_values(linear) for linear in linears)
    assert stored <= budget, f"stored {stored} values of a budget of {budget}"
    return Plan(assignments=assignments, budget_values=budget, stored_values=stored)


def by_role(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """The linears of each type: those with the same role, in the order they came in."""
    types: dict[str, list[Linear]] = {}
    for linear in linears:
        types.setdefault(linear.role, []).append(linear)
    return types
