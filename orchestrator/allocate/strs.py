"""ASVD's sensitivity-based truncation rank search (Yuan et al., arXiv 2312.05821)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.budget import Budget, make_plan, too_small
from orchestrator.allocate.steps import EVERY_RANK
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.cost import VALUES
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_number, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Strs(Allocator):
    """STRS: rank of a linear by the loss of the model with this linear alone truncated.

    Each linear is truncated to each kept fraction of a grid, with all others dense, and the mean
    cross-entropy of the model on a few calibration sequences is measured; the paper's perplexity is
    its exponential and gives the same order. All trials are sorted by descending loss. A threshold
    rejects the trials before it; every linear gets the smallest size among its remaining trials,
    and stays dense if none remains. The threshold is the lowest one whose plan is within the
    budget: the stored total grows with every rejected trial, so trials are rejected one by one, in
    integer arithmetic. Ties follow the order of the linears, then the rank.

    Ranks are floor(kept · m n / (m + n)), below break-even; for pivoted factors as in `Uniform`. A
    linear for which no kept fraction of the grid allows a rank stays dense; equal ranks are one
    trial.

    Laws: all of `orchestrator.allocate`, with sensitivities instead of curves. A budget below the
    smallest size of the grid everywhere is an `InfeasibleError` too. The unused budget is less than
    the step of the next linear, a fifth of its weight with the default grid, up to three fifths
    from the smallest size to the dense one; it is reported as slack.

    O(n log n) in the number of trials; measuring the losses costs linears · grid evaluations of
    half the model on average (see `stages.score_sensitivities.job`).

    Departures from the authors' code: it returns the last midpoint of a binary search, which may be
    off by one; here the threshold is converged. Ranks are multiples only on request. The language
    model head does not belong to a block and is unchanged. The paper's grid is 0.1 to 0.9 in steps
    of 0.1, on 32 sequences of 2048 tokens: 2.25 times the trials on 16 times the text.
    """

    source: ClassVar[str] = "arXiv 2312.05821"
    scoring: ClassVar[Scoring] = Scoring.SENSITIVITIES
    grid: str = "0.4 0.6 0.8 0.9"
    """Kept fractions of the trials, ascending, between 0 and 1."""
    windows: int = 2
    """Number of calibration sequences, the first ones, on which a loss is measured."""

    def __post_init__(self) -> None:
        check_whole("strs: windows", self.windows, 1, 10**6)
        if not isinstance(self.grid, str):
            raise UsageError(f'strs: grid is {self.grid!r}; it must be words like "0.4 0.6 0.8"')
        try:
            kept = self.kept
        except ValueError as error:
            raise UsageError(
                f'strs: grid is {self.grid!r}; it must be numbers like "0.4 0.6 0.8"'
            ) from error
        if not kept or sorted(set(kept)) != [*kept]:
            raise UsageError(
                f"strs: grid is {self.grid!r}; it must have at least one number and be ascending"
            )
        for each in kept:
            check_number("strs: grid", each, 1e-6, 1 - 1e-6)

    @property
    def kept(self) -> tuple[float, ...]:
        """Kept fractions of the grid."""
        return tuple(float(word) for word in self.grid.replace(",", " ").split())

    def scoring_passes(self, num_linears: int) -> float:
        """Return the passes of all trials; a trial starts at the block that it cuts, so it takes
        half of the model on average."""
        return len(self.kept) * self.windows * num_linears / 2

    def ranks(self, linear: Linear, allowed: AllowedRanks = EVERY_RANK) -> tuple[int, ...]:
        """Ranks at which a linear is tried, ascending; empty if factors do not save values."""
        ranks = {self.rank(linear, kept, allowed) for kept in self.kept}
        return tuple(sorted(ranks - {0}))

    def rank(self, linear: Linear, kept: float, allowed: AllowedRanks = EVERY_RANK) -> int:
        """Largest allowed rank within a kept fraction of a linear; 0 if none."""
        return allowed.within(linear, Budget(kept).share([linear]))

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `total`, of another cost by the cheapest of dense and the grid."""
        cost, form = budget.cost, budget.form
        if cost is VALUES:
            self.total(linears, budget)
            return
        total, allowed, least = budget.total(linears), budget.in_values().ranks, 0
        for linear in linears:
            costs = [cost.factors(linear, form, rank) for rank in self.ranks(linear, allowed)]
            least += min([*costs, cost.dense(linear)])
        if least > total:
            dense, what = sum(map(cost.dense, linears)), "the smallest plan of strs's grid"
            raise too_small(budget, total, dense, least=least, what=what)

    def total(self, linears: Sequence[Linear], budget: Budget) -> int:
        """Return the number of values that the linears may store together.

        Raises:
            InfeasibleError: As `Budget.total`; also if the smallest size of the grid stores more.
        """
        total, form = budget.total(linears), budget.form
        ranks = {linear.name: self.ranks(linear, budget.ranks) for linear in linears}
        least = sum(min(_sizes(linear, ranks[linear.name], form)) for linear in linears)
        if least > total:
            raise InfeasibleError(
                f"keep: {budget.kept} allows {total} values, but the smallest of strs's grid, "
                f"{self.kept[0]}, stores {least}; give a grid that begins lower, or keep more"
            )
        return total

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan of the lowest threshold within the budget; uses the sensitivities.

        Raises:
            InfeasibleError: As `total`.
            InputError: A sensitivity is missing or not finite.
        """
        total, form = self.total(linears, budget), budget.form
        trials = [
            (-_sensitivity(curves[linear.name], rank), linear, rank)
            for linear in linears
            for rank in self.ranks(linear, budget.ranks)
        ]
        left = {linear.name: {*self.ranks(linear, budget.ranks)} for linear in linears}
        size = {linear.name: min(_sizes(linear, left[linear.name], form)) for linear in linears}
        stored = sum(size.values())
        for _, linear, rank in sorted(trials, key=lambda trial: trial[0]):
            others = left[linear.name] - {rank}
            smallest = min(_sizes(linear, others, form))
            if stored + smallest - size[linear.name] > total:
                break
            stored += smallest - size[linear.name]
            left[linear.name], size[linear.name] = others, smallest
        assignments = {
            linear.name: Assignment(form=form.name, rank=min(left[linear.name]))
            if left[linear.name]
            else Assignment(form="dense")
            for linear in linears
        }
        return make_plan(linears, assignments, total)


def _sizes(linear: Linear, ranks: Collection[int], form: Form) -> list[int]:
    """Stored values of the linear at each of the ranks, and dense."""
    return [*(form.factor_values(linear, rank) for rank in ranks), linear.values]


def _sensitivity(curve: Curve, rank: int) -> float:
    loss = curve.sensitivities.get(rank, math.nan)
    if not math.isfinite(loss):
        raise InputError(
            f"{curve.name}: its sensitivity at rank {rank} is "
            f"{curve.sensitivities.get(rank, 'missing')}; strs needs a finite loss for every trial"
        )
    return loss
