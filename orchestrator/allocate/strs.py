"""ASVD's sensitivity-based truncation rank search (Yuan et al., arXiv 2312.05821)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.budget import budget_values, make_plan, share_values
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import LOW_RANK, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_number, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Strs(Allocator):
    """STRS: what the model loses where one linear alone is cut decides how far that one is cut.

    Every linear is cut to each kept fraction of a grid, all others dense, and the model's mean
    cross-entropy on a few calibration sequences is taken; the paper's perplexity is its exponential
    and gives the same order. All these trials stand in one list, the largest loss first. A
    threshold in it rejects the trials before it; every linear takes the smallest size among its
    trials that are left, and stays dense where none is. The threshold is the lowest one whose plan
    fits the budget: the stored total grows with every rejected trial, so it is found by rejecting
    one after the other, in whole numbers. Equal losses go in the order of the linears, then by
    rank.

    Ranks are floor(kept · m n / (m + n)), below break-even; pivoted, as `Uniform` has them. A
    linear of which no kept fraction of the grid holds a rank stays dense; equal ranks are one
    trial.

    Laws: all of `orchestrator.allocate`, with sensitivities in the place of curves. A budget below
    the smallest of the grid everywhere is an `InfeasibleError` too. What is left of the budget is
    less than the next linear's step, a fifth of its weight with the default grid, up to three
    fifths where it goes from the smallest size to the dense one; it is reported as slack.

    Costs O(n log n) in the number of trials; taking the losses costs linears · grid evaluations of
    half the model on average (see `stages.score_sensitivities.job`).

    From the authors' code: theirs ends with the last midpoint of a binary search, which may be one
    off; this is the converged threshold. Ranks are not rounded to a multiple. The language
    model's head is no linear of a block, and stays as it is. The paper's grid is 0.1 to 0.9 in
    steps of 0.1, on 32 sequences of 2048 tokens: 2.25 times the trials on 16 times the text.
    """

    scoring: ClassVar[Scoring] = Scoring.SENSITIVITIES
    grid: str = "0.4 0.6 0.8 0.9"
    """Kept fractions that every linear is tried at, ascending, between 0 and 1."""
    windows: int = 2
    """Calibration sequences that a loss is taken on, the first ones."""

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
            raise UsageError(f"strs: grid is {self.grid!r}; it must ascend, one number at least")
        for each in kept:
            check_number("strs: grid", each, 1e-6, 1 - 1e-6)

    @property
    def kept(self) -> tuple[float, ...]:
        """The kept fractions of the grid."""
        return tuple(float(word) for word in self.grid.replace(",", " ").split())

    def ranks(self, linear: Linear, form: Form = LOW_RANK) -> tuple[int, ...]:
        """The ranks that a linear is tried at, ascending; none where factors save nothing."""
        ranks = {self.rank(linear, kept, form) for kept in self.kept}
        return tuple(sorted(ranks - {0}))

    def rank(self, linear: Linear, kept: float, form: Form = LOW_RANK) -> int:
        """The rank that a kept fraction of a linear holds, below break-even; 0 where none."""
        rank = form.rank_within(linear, share_values([linear], kept))
        return max(min(rank, form.break_even(linear) - 1), 0)

    def check_budget(self, linears: Sequence[Linear], keep: float, form: Form) -> None:
        """Raise the errors of `budget`."""
        self.budget(linears, keep, form)

    def budget(self, linears: Sequence[Linear], keep: float, form: Form = LOW_RANK) -> int:
        """The values that the linears may store together.

        Raises:
            UsageError, InfeasibleError: As `budget_values`; also where the smallest of the grid
                stores more.
        """
        budget = budget_values(linears, keep, form)
        ranks = {linear.name: self.ranks(linear, form) for linear in linears}
        least = sum(min(_sizes(linear, ranks[linear.name], form)) for linear in linears)
        if least > budget:
            raise InfeasibleError(
                f"keep: {keep} allows {budget} values, but the smallest of strs's grid, "
                f"{self.kept[0]}, stores {least}; give a grid that begins lower, or keep more"
            )
        return budget

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        keep: float,
        cosines: Mapping[str, float],
        *,
        form: Form = LOW_RANK,
    ) -> Plan:
        """The plan of the lowest threshold that fits; of the curves the sensitivities are used.

        Raises:
            UsageError, InfeasibleError: As `budget`.
            InputError: A sensitivity is missing or not finite.
        """
        budget = self.budget(linears, keep, form)
        trials = [
            (-_sensitivity(curves[linear.name], rank), linear, rank)
            for linear in linears
            for rank in self.ranks(linear, form)
        ]
        left = {linear.name: {*self.ranks(linear, form)} for linear in linears}
        size = {linear.name: min(_sizes(linear, left[linear.name], form)) for linear in linears}
        stored = sum(size.values())
        for _, linear, rank in sorted(trials, key=lambda trial: trial[0]):
            others = left[linear.name] - {rank}
            smallest = min(_sizes(linear, others, form))
            if stored + smallest - size[linear.name] > budget:
                break
            stored += smallest - size[linear.name]
            left[linear.name], size[linear.name] = others, smallest
        assignments = {
            linear.name: Assignment(form=form.name, rank=min(left[linear.name]))
            if left[linear.name]
            else Assignment(form="dense")
            for linear in linears
        }
        return make_plan(linears, assignments, budget)


def _sizes(linear: Linear, ranks: Collection[int], form: Form) -> list[int]:
    """Values that the linear stores at each of the ranks, and dense."""
    return [*(form.factor_values(linear, rank) for rank in ranks), linear.values]


def _sensitivity(curve: Curve, rank: int) -> float:
    loss = curve.sensitivities.get(rank, math.nan)
    if not math.isfinite(loss):
        raise InputError(
            f"{curve.name}: its sensitivity at rank {rank} is "
            f"{curve.sensitivities.get(rank, 'missing')}; strs needs a finite loss of every trial"
        )
    return loss
