"""The budget, its lower limit, and the plan that results from an allocation."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.forms import LOW_RANK, Divided, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan

LEAST: dict[Divided, str] = {
    "ranks": "rank 1",
    "entries": "one entry",
    "ranks and entries together": "rank 1",
    "linears": "the cut",
}
"""Smallest size of a linear in a message."""


def share_values(linears: Sequence[Linear], keep: float) -> int:
    """Return the kept fraction of the dense values of these linears, `floor(keep * dense values)`.

    `keep` is interpreted as its decimal representation: 0.3 of 10 values is 3, not 2.
    """
    return math.floor(Fraction(str(keep)) * sum(linear.values for linear in linears))


def budget_values(linears: Sequence[Linear], keep: float, form: Form = LOW_RANK) -> int:
    """Return the number of values that these linears may store together.

    Raises:
        UsageError: `keep` is outside (0, 1].
        InfeasibleError: The smallest size of every linear, rank 1 or one entry, stores more.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep: {keep} is outside (0, 1]; 0.8 keeps four of five values")
    dense = sum(linear.values for linear in linears)
    budget = share_values(linears, keep)
    least = sum(map(form.least_values, linears))
    if budget < least:
        what = LEAST[form.divided]
        raise InfeasibleError(
            f"keep: {keep} allows {budget} of {dense} values, but {what} for each of "
            f"{len(linears)} linears stores {least}; the least possible is "
            f"{math.ceil(1e6 * least / dense) / 1e6}"
        )
    return budget


def assign_rank(linear: Linear, rank: int, values: int, form: Form) -> Assignment:
    """Assign this rank, limited by break-even.

    At break-even and above, factors do not save values: the linear stays dense if `values` holds
    the dense weight, and otherwise gets the last rank below break-even.
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
