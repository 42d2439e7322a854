"""The budget, its lower limit, and the plan that results from an allocation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks, Multiple
from orchestrator.plan.cost import VALUES, Cost
from orchestrator.plan.forms import LOW_RANK, Divided, Form
from orchestrator.plan.linear import ExpertsModule, Linear
from orchestrator.plan.plan import Assignment, Plan

LEAST: dict[Divided, str] = {
    "entries": "one entry",
    "ranks and entries together": "rank 1",
    "linears": "the cut",
}
"""Smallest size of a linear in a message, except of ranks alone, and of experts, which may be 0."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Cost that linears may have together, as a fraction of that of their dense weights.

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
    cost: Cost = field(default=VALUES, kw_only=True)
    """Cost that the fraction limits. `fill_budget` ensures it for allocators that divide values
    alone."""
    experts: Sequence[ExpertsModule] = field(default=(), kw_only=True)
    """Experts of the model, for allocators that may drop some."""

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise UsageError(f"keep: {self.kept} is outside (0, 1]; 0.8 keeps four of five values")

    @property
    def ranks(self) -> AllowedRanks:
        """Ranks that a linear may get."""
        return AllowedRanks(self.form, self.multiple, self.cost)

    def in_values(self, kept: float | None = None) -> "Budget":
        """Return the budget of this fraction of the values, or of another one."""
        return replace(self, kept=self.kept if kept is None else kept, cost=VALUES)

    def share(self, linears: Sequence[Linear]) -> int:
        """Return the kept fraction of the dense cost of some linears, `floor(kept * dense)`."""
        return self.floor(sum(map(self.cost.dense, linears)))

    def floor(self, whole: int) -> int:
        """Return the kept fraction of a whole number, rounded down."""
        return math.floor(Fraction(str(self.kept)) * whole)

    def total(self, linears: Sequence[Linear]) -> int:
        """Return the cost, a number of values, that all linears of the model may have together.

        Raises:
            InfeasibleError: The smallest size of every linear, rank 1 or one entry, costs more.
            InputError: As `TimeCost`.
        """
        total = self.share(linears)
        least = sum(map(self.ranks.least_cost, linears))
        if total >= least:
            return total
        dense = sum(map(self.cost.dense, linears))
        if self.cost is not VALUES:
            what = f"the smallest of allowed ranks, or dense, in each of {len(linears)} linears"
            raise too_small(self, total, dense, least=least, what=what)
        divided = self.form.divided
        what = self.ranks.smallest if divided == "ranks" else LEAST[divided]
        raise InfeasibleError(
            f"keep: {self.kept} allows {total} of {dense} values, but {what} for each of "
            f"{len(linears)} linears stores {least}; the least possible is "
            f"{_fraction(least, dense)}"
        )


def too_small(budget: Budget, total: int, dense: int, *, least: int, what: str) -> InfeasibleError:
    """Return the error of a budget of operations or time, with the smallest possible fraction.

    Args:
        total: Cost within the budget.
        dense: Cost of the dense weights.
        least: Smallest possible cost.
        what: Plan that has it.
    """
    cost = budget.cost
    return InfeasibleError(
        f"{cost.field}: {budget.kept} allows {cost.shown(total)}, where dense weights take "
        f"{cost.shown(dense)}, but {what}, takes {cost.shown(least)}; the least possible is "
        f"{_fraction(least, dense)}"
    )


def _fraction(least: int, dense: int) -> float:
    """Return a fraction with six digits, rounded up so that it suffices."""
    return math.ceil(1e6 * least / dense) / 1e6


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
    linears: Sequence[Linear],
    assignments: Mapping[str, Assignment],
    total: int,
    cost: Cost = VALUES,
) -> Plan:
    """Make the plan in the order of the linears; the caller ensures that it is within the total.

    Of a total of another cost than values, the plan's budget is the values that it stores.
    """
    assignments = {linear.name: assignments[linear.name] for linear in linears}
    stored = sum(assignments[linear.name].stored_values(linear) for linear in linears)
    spent = stored if cost is VALUES else plan_cost(linears, assignments, cost)
    assert spent <= total, f"spent {spent} {cost.name} of a budget of {total}"
    within = total if cost is VALUES else stored
    return Plan(assignments=assignments, budget_values=within, stored_values=stored)


def plan_cost(linears: Sequence[Linear], assignments: Mapping[str, Assignment], cost: Cost) -> int:
    """Return the cost of all linears together."""
    return sum(cost.of(linear, assignments[linear.name]) for linear in linears)


def by_role(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """Group the linears by role, in their order."""
    types: dict[str, list[Linear]] = {}
    for linear in linears:
        types.setdefault(linear.role, []).append(linear)
    return types
