"""The budget, its lower limit, and the plan that results from an allocation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks, Multiple
from orchestrator.plan.forms import LOW_RANK, Divided, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan

LEAST: dict[Divided, str] = {
    "entries": "one entry",
    "ranks and entries together": "rank 1",
    "linears": "the cut",
}
"""Smallest size of a linear in a message, except of ranks alone."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Number of values that linears may store, as a fraction of their dense values.

    Raises:
        UsageError: The fraction is outside (0, 1].
    """

    kept: float
    """Kept fraction, interpreted as its decimal representation: 0.3 of 10 values is 3, not 2."""
    form: Form = LOW_RANK
    """Form of the linears that are cut."""
    in_bytes: bool = field(default=False, kw_only=True)
    """True if the fraction limits the stored bytes as well, indices included. `fill_budget` ensures
    it; an allocator divides the values."""
    multiple: Multiple = field(default=1, kw_only=True)
    """Number of which ranks are multiples."""

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise UsageError(f"keep: {self.kept} is outside (0, 1]; 0.8 keeps four of five values")

    @property
    def ranks(self) -> AllowedRanks:
        """Ranks that a linear may get."""
        return AllowedRanks(self.form, self.multiple)

    def share(self, linears: Sequence[Linear]) -> int:
        """Return the kept fraction of the dense values of some linears, `floor(kept * dense)`."""
        return math.floor(Fraction(str(self.kept)) * sum(linear.values for linear in linears))

    def total(self, linears: Sequence[Linear]) -> int:
        """Return the number of values that all linears of the model may store together.

        Raises:
            InfeasibleError: The smallest size of every linear, rank 1 or one entry, stores more.
        """
        dense = sum(linear.values for linear in linears)
        total = self.share(linears)
        least = sum(map(self.ranks.least_values, linears))
        if total < least:
            divided = self.form.divided
            what = self.ranks.smallest if divided == "ranks" else LEAST[divided]
            raise InfeasibleError(
                f"keep: {self.kept} allows {total} of {dense} values, but {what} for each of "
                f"{len(linears)} linears stores {least}; the least possible is "
                f"{math.ceil(1e6 * least / dense) / 1e6}"
            )
        return total


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


def make_plan(linears: Sequence[Linear], assignments: Mapping[str, Assignment], total: int) -> Plan:
    """Make the plan in the order of the linears; the caller ensures that it is within the total."""
    assignments = {linear.name: assignments[linear.name] for linear in linears}
    stored = sum(assignments[linear.name].stored_values(linear) for linear in linears)
    assert stored <= total, f"stored {stored} values of a budget of {total}"
    return Plan(assignments=assignments, budget_values=total, stored_values=stored)


def by_role(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """Group the linears by role, in their order."""
    types: dict[str, list[Linear]] = {}
    for linear in linears:
        types.setdefault(linear.role, []).append(linear)
    return types
