"""Uniform allocation: the same kept fraction for every linear, in ranks or in entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, assign_rank, make_plan
from orchestrator.allocate.steps import spend_shares
from orchestrator.errors import InfeasibleError
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import Divided
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(Allocator):
    """The same kept fraction of every m × n linear, in ranks or in entries; curves are not used.

    Rank floor(keep · m n / (m + n)), the allocation of SVD-LLM (arXiv 2403.07378). For pivoted
    factors, the largest rank r with r (m + n) - r² at most keep · m n, as in PIFA (arXiv
    2501.19090). Of a sparse weight floor(keep · m n) entries, as in Wanda (arXiv 2306.11695).

    Rounding down leaves less than one rank or one value per linear unused; it is reported as slack
    and not reassigned, because the published figures are for exactly these sizes.

    Ranks that are multiples of a larger number would leave up to that many per linear. Each linear
    gets the multiples that its share holds; what is left pays for the next multiples of those that
    exceed their share least, ties in the order of the linears, until the next one does not fit.
    """

    source: ClassVar[str] = "arXiv 2403.07378, 2306.11695"
    divides: ClassVar[tuple[Divided, ...]] = ("ranks", "entries")

    @property
    def is_even(self) -> bool:
        return True

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: As `Budget.total`; also if the share of a single linear is below rank 1
                or one entry; the message names it.
        """
        total = budget.total(linears)
        if not budget.form.has_nonzeros and any(budget.ranks.step(each) > 1 for each in linears):
            return make_plan(linears, _multiples(linears, budget, total), total)
        assign = _entries if budget.form.has_nonzeros else _rank
        assignments = {linear.name: assign(linear, budget) for linear in linears}
        return make_plan(linears, assignments, total)


def _multiples(linears: Sequence[Linear], budget: Budget, total: int) -> dict[str, Assignment]:
    """Assign multiples by the values that each adds beyond the linear's own share.

    Raises:
        InfeasibleError: The smallest multiples store more than the budget.
    """
    return spend_shares(linears, [budget.share([each]) for each in linears], total, budget.ranks)


def _rank(linear: Linear, budget: Budget) -> Assignment:
    """Assign the largest rank within the linear's own share.

    Raises:
        InfeasibleError: It is below 1.
    """
    share, form = budget.share([linear]), budget.form
    rank = form.rank_within(linear, share)
    if share < linear.values and min(rank, form.break_even(linear) - 1) < 1:
        raise InfeasibleError(
            f"{linear.name}: {budget.kept} of a {linear.out_features} x {linear.in_features} "
            f"weight is below rank 1, which stores {form.factor_values(linear, 1)} of "
            f"{linear.values} values; keep more, or exclude it with --ignore"
        )
    return assign_rank(linear, rank, share, form)


def _entries(linear: Linear, budget: Budget) -> Assignment:
    """Assign as many entries as the linear's own share has values.

    Raises:
        InfeasibleError: It has none.
    """
    share = budget.share([linear])
    if share < 1:
        raise InfeasibleError(
            f"{linear.name}: {budget.kept} of a {linear.out_features} x {linear.in_features} "
            "weight is below one entry; keep more, or exclude it with --ignore"
        )
    if share == linear.values:
        return Assignment(form="dense")
    return Assignment(form=budget.form.name, nonzeros=share)
