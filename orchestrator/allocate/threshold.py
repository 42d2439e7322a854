"""One threshold for the whole model: the next step is the one with the largest gain per cost.

Indices: K steps of a linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.experts.drops import check_droppable, spend_dropping
from orchestrator.allocate.sampled_curve import SampledCurve, sample_curve
from orchestrator.allocate.steps import (
    EVERY_RANK,
    Steps,
    hull_rates,
    rates,
    spend,
    step_costs,
)
from orchestrator.errors import UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.plan.whole_experts import check_routers
from orchestrator.recipe.options import check_choice, check_number

MOST_STEPS = 100_000_000
"""Maximum number of steps of all linears, 40 bytes each; above it, curves are sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold(Allocator):
    """Minimises the summed loss of all curves under the budget; the curves must have one unit.

    Without break-even the optimum keeps component i of a linear [m, n] if σ_i² / (m + n) is at
    least τ, one τ for the model, determined by the budget. A dense weight costs less than all its
    components, so the loss of a linear as a function of its values is not convex. `hull` uses its
    lower convex hull, on which the last ranks before the dense weight are merged into one step; it
    is optimal for every budget that ends at a corner of some hull. `break_even` is the published
    rule: the dense weight replaces the component at break-even rank, not earlier.

    The curves of two-sided factors are in nats and thus comparable. Those of other norms are in
    units of the outputs of each linear; they can be summed, but the sum is unrelated to the loss.

    Curves may be `SampledCurve`s, for models with very many linears: this costs at most the sum of
    their errors times their totals.

    Of ranks that are multiples, a step is one multiple: the optimum is over multiples, not that of
    every rank, rounded.

    `hull` divides any cost of the budget: values, operations, cache or measured time. `break_even`
    is a rule about values.

    With `drop`, rank 0 of a whole expert is a step too (`allocate.experts.drops`). Its loss is in
    the unit of the curves, and so unrelated to that of the model where it is not nats. Of other
    costs than values, the largest plan of values within them is taken.

    With `floor` above 0 the first part of the budget goes to a uniform share of every linear. Then
    the rank of a linear may fall as the budget grows; the stored total does not.
    """

    dense: Literal["hull", "break_even"] = "hull"
    """Rule for making a linear dense."""
    floor: float = 0.0
    """Fraction of the uniform share that every linear gets first."""
    drop: Literal["no", "zero", "reroute"] = "no"
    """Drop whole experts: leave routers as they are, or without the rows of those."""

    def __post_init__(self) -> None:
        check_choice("threshold: dense", self.dense, ("hull", "break_even"))
        check_number("threshold: floor", self.floor, 0, 1)
        check_choice("threshold: drop", self.drop, ("no", "zero", "reroute"))
        if self.drop != "no" and (self.floor or self.dense != "hull"):
            raise UsageError(
                "threshold: drop gives experts no share and takes hulls; leave out floor and dense"
            )

    @property
    def divides_costs(self) -> bool:
        return self.dense == "hull" and self.drop == "no"

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve | SampledCurve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: As `Budget.total`.
        """
        self.check_budget(linears, budget)
        ranks = budget.ranks
        if self.dense == "hull" and sum(map(ranks.count, linears)) > MOST_STEPS:
            curves = {each.name: _sampled(each, curves[each.name], ranks) for each in linears}
        ends = [_ends(curves[linear.name]) for linear in linears]
        if self.drop != "no":
            steps = [self._steps(each, curves[each.name], ranks) for each in linears]
            plan = spend_dropping(linears, curves, budget, steps=steps, ends=ends)
            return replace(plan, reroutes=self.drop == "reroute")
        total = budget.total(linears)
        keys = (self._floored(linear, curves[linear.name], budget) for linear in linears)
        taken = spend(linears, keys, total, where="the model", ranks=ranks, ends=ends)
        return make_plan(linears, taken, total, budget.cost)

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `Budget.total`, or those of `check_droppable` if experts may go."""
        if self.drop == "reroute":
            check_routers(budget.experts, "threshold.drop=zero")
        if self.drop != "no":
            check_droppable(linears, budget)
        else:
            budget.total(linears)

    def _floored(self, linear: Linear, curve: Curve | SampledCurve, budget: Budget) -> np.ndarray:
        """Return the keys, with steps within the floor before all others."""
        key_K = self.keys(linear, curve, budget.ranks)
        if not self.floor:
            return key_K
        spent_K = np.cumsum(step_costs(linear, budget.ranks, _ends(curve)))
        return np.where(spent_K <= self.floor * budget.share([linear]), -1.0, key_K)

    def keys(
        self, linear: Linear, curve: Curve | SampledCurve, ranks: AllowedRanks = EVERY_RANK
    ) -> np.ndarray:
        """Compute the cost per gain of each step, ascending, [K]: 1 / τ at which the step is
        taken."""
        found = self._steps(linear, curve, ranks)
        if self.dense == "break_even":
            return rates(found.cost_K, found.gain_K)
        if not found.cost_K.any():
            # steps of cost 0, of a linear without a cache, are taken first
            return np.zeros(len(found.cost_K))
        if not ranks.cost.has_fixed_part or len(found.cost_K) == 1:
            return hull_rates(found.cost_K, found.gain_K)
        # the first step is taken in any case, so that what it costs is no reason against others
        return np.concatenate([[0.0], hull_rates(found.cost_K[1:], found.gain_K[1:])])

    def _steps(self, linear: Linear, curve: Curve | SampledCurve, ranks: AllowedRanks) -> Steps:
        """Return the cost and the gain of each step."""
        cost_K = step_costs(linear, ranks, _ends(curve))
        gain_K, step = np.zeros(len(cost_K)), ranks.step(linear)
        gain_K[:-1] = _gains(curve, len(cost_K) - 1, step)
        if self.dense == "break_even":
            if isinstance(curve, SampledCurve):
                raise UsageError(
                    "threshold: dense is 'break_even', which needs full, not sampled curves"
                )
            last = curve.energies[(len(cost_K) - 1) * step : len(cost_K) * step].sum()
            gain_K[-1] = last * cost_K[-1] / (step * linear.rank_cost)
        else:
            # energy that no step before the dense weight captures
            gain_K[-1] = max(curve.total - float(gain_K[:-1].sum()), 0.0)
        return Steps(cost_K, gain_K)


def _sampled(linear: Linear, curve: Curve | SampledCurve, ranks: AllowedRanks) -> SampledCurve:
    if isinstance(curve, SampledCurve):
        return curve
    step = ranks.step(linear)
    return sample_curve(curve, ranks.count(linear) * step, step=step)


def _ends(curve: Curve | SampledCurve) -> np.ndarray | None:
    """Return the final ranks of the steps; None means every allowed rank."""
    return curve.ranks if isinstance(curve, SampledCurve) else None


def _gains(curve: Curve | SampledCurve, count: int, step: int) -> np.ndarray:
    """Return the energies of the first `count` steps, of `step` ranks each unless sampled."""
    if isinstance(curve, SampledCurve):
        return curve.energies[:count]
    gains: np.ndarray = curve.energies[: count * step].reshape(count, step).sum(axis=1)
    return gains
