"""Uniform allocation: the same kept fraction for every linear, in ranks or in entries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import assign_rank, budget_values, make_plan, share_values
from orchestrator.errors import InfeasibleError
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import LOW_RANK, SPARSE, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(Allocator):
    """Rank floor(keep · m n / (m + n)) for each m × n linear; curves are not used.

    The allocation of SVD-LLM (arXiv 2403.07378). For pivoted factors, the largest rank r with r (m
    + n) - r² at most keep · m n, as in PIFA (arXiv 2501.19090).

    Rounding down leaves less than one rank per linear unused; it is reported as slack and not
    reassigned, because the published figures are for exactly these ranks.
    """

    @property
    def is_even(self) -> bool:
        return True

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        keep: float,
        cosines: Mapping[str, float],
        *,
        form: Form = LOW_RANK,
    ) -> Plan:
        """Allocate the budget.

        Raises:
            UsageError, InfeasibleError: As `budget_values`; also if the share of a single linear is
                below rank 1; the message names it.
        """
        budget = budget_values(linears, keep, form)
        assignments = {}
        for linear in linears:
            share = share_values([linear], keep)
            rank = form.rank_within(linear, share)
            if share < linear.values and min(rank, form.break_even(linear) - 1) < 1:
                raise InfeasibleError(
                    f"{linear.name}: {keep} of a {linear.out_features} x {linear.in_features} "
                    f"weight is below rank 1, which stores {form.factor_values(linear, 1)} of "
                    f"{linear.values} values; keep more, or exclude it with --ignore"
                )
            assignments[linear.name] = assign_rank(linear, rank, share, form)
        return make_plan(linears, assignments, budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformSparse(Allocator):
    """floor(keep · m n) entries for each m × n linear, as in Wanda (arXiv 2306.11695).

    Curves are not used. Rounding down leaves less than one value per linear unused.
    """

    @property
    def is_even(self) -> bool:
        return True

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        keep: float,
        cosines: Mapping[str, float],
        *,
        form: Form = SPARSE,
    ) -> Plan:
        """Allocate the budget.

        Raises:
            UsageError, InfeasibleError: As `budget_values`; also if the share of a single linear is
                below one entry; the message names it.
        """
        budget = budget_values(linears, keep, form)
        assignments = {}
        for linear in linears:
            share = share_values([linear], keep)
            if share < 1:
                raise InfeasibleError(
                    f"{linear.name}: {keep} of a {linear.out_features} x {linear.in_features} "
                    "weight is below one entry; keep more, or exclude it with --ignore"
                )
            whole = share == linear.values
            assignments[linear.name] = (
                Assignment(form="dense") if whole else Assignment(form=form.name, nonzeros=share)
            )
        return make_plan(linears, assignments, budget)
