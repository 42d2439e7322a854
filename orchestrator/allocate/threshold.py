"""One threshold for the whole model: the next step where it gains most for its values.

Indices: K steps of a linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import budget_values, make_plan, share_values
from orchestrator.allocate.sampled_curve import Knots, sample_curve
from orchestrator.allocate.steps import spend, step_costs
from orchestrator.errors import UsageError
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import LOW_RANK, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.recipe.options import check_choice, check_number

MOST_STEPS = 100_000_000
"""Of all linears together, 40 bytes each; with more, curves are taken at their knots alone."""
NEVER_GAINS = np.finfo(np.float64).max
"""Key of a step that gains nothing: after all others, but taken when there is room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold(Allocator):
    """Minimises the summed loss of all curves under the budget; they must be in one unit.

    Without break-even the optimum keeps component i of a linear [m, n] while σ_i² / (m + n) is at
    least τ, one τ for the model, which the budget sets. A dense weight costs less than all its
    components, so a linear's loss against its values is no convex curve: `hull` takes its lower
    convex hull, along which the last ranks before the dense weight are skipped as one step, and is
    the optimum for every budget that ends at a corner of some hull. `break_even` is the published
    rule: the dense weight takes the place of the component at break-even rank, no sooner.

    The curves of two-sided factors are in nats and fit. Those of other norms are in units of each
    linear's own outputs: they mix too, but what is summed then means nothing for the loss.

    Curves may be `Knots`, for models of very many linears: what the plan loses by them is at most
    the sum of their errors times their totals.

    With `floor` above 0 the budget's first part goes to a uniform share of every linear, and the
    ranks of one linear may fall as the budget grows; the stored total does not.
    """

    dense: Literal["hull", "break_even"] = "hull"
    """When the dense weight is worth its values."""
    floor: float = 0.0
    """Fraction of the uniform share that every linear gets first."""

    def __post_init__(self) -> None:
        check_choice("threshold: dense", self.dense, ("hull", "break_even"))
        check_number("threshold: floor", self.floor, 0, 1)

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve | Knots],
        keep: float,
        cosines: Mapping[str, float],
        *,
        form: Form = LOW_RANK,
    ) -> Plan:
        """
        Raises:
            UsageError, InfeasibleError: As `budget_values`.
        """
        budget = budget_values(linears, keep, form)
        if self.dense == "hull" and sum(map(form.break_even, linears)) > MOST_STEPS:
            curves = {each.name: _in_knots(each, curves[each.name], form) for each in linears}
        ranks = [_ranks(curves[linear.name]) for linear in linears]
        keys = (self._floored(linear, curves[linear.name], keep, form) for linear in linears)
        taken = spend(linears, keys, budget, where="the model", ranks=ranks, form=form)
        return make_plan(linears, taken, budget)

    def _floored(self, linear: Linear, curve: Curve | Knots, keep: float, form: Form) -> np.ndarray:
        """The keys, those of steps within the floor before all others."""
        key_K = self.keys(linear, curve, form)
        if not self.floor:
            return key_K
        spent_K = np.cumsum(step_costs(linear, _ranks(curve), form))
        return np.where(spent_K <= self.floor * share_values([linear], keep), -1.0, key_K)

    def keys(self, linear: Linear, curve: Curve | Knots, form: Form = LOW_RANK) -> np.ndarray:
        """Values per gain of each step, ascending, [K]: 1 / τ at which the step is taken."""
        cost_K = step_costs(linear, _ranks(curve), form)
        gain_K = np.zeros(len(cost_K))
        gain_K[:-1] = curve.energies[: len(cost_K) - 1]
        if self.dense == "break_even":
            if isinstance(curve, Knots):
                raise UsageError("threshold: dense is 'break_even', which wants curves, not knots")
            last = curve.energies[len(cost_K) - 1 : len(cost_K)].sum()
            gain_K[-1] = last * cost_K[-1] / linear.rank_cost
            return _rates(cost_K, gain_K)
        # what no step before the dense weight captures
        gain_K[-1] = max(curve.total - float(gain_K[:-1].sum()), 0.0)
        return hull_rates(cost_K, gain_K)


def _in_knots(linear: Linear, curve: Curve | Knots, form: Form) -> Knots:
    last = max(form.break_even(linear) - 1, 0)
    return curve if isinstance(curve, Knots) else sample_curve(curve, last)


def _ranks(curve: Curve | Knots) -> np.ndarray | None:
    """The ranks that steps end at; nothing: every one."""
    return curve.ranks if isinstance(curve, Knots) else None


def _rates(cost_K: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """Cost per gain; a step waits for those that it builds on."""
    with np.errstate(divide="ignore", over="ignore"):
        rate_K = np.where(gain_K > 0, cost_K / gain_K, NEVER_GAINS)
    return np.maximum.accumulate(np.minimum(rate_K, NEVER_GAINS))


def hull_rates(cost_K: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """Cost per gain of the piece of the lower convex hull that each step lies on.

    Steps that gain more per value than those before them are taken together with them. The last
    piece begins where the line to the end rises least, which finds it whole; before it neighbours
    in the wrong order are joined until there are none, and their order does not matter. O(K) a
    round, and few rounds, since energies descend.
    """
    # what is still to gain and to pay before each step; sums from the small end lose no digits
    steps = len(cost_K)
    gain_left_K, cost_left_K = np.zeros(steps + 1), np.zeros(steps + 1, dtype=np.int64)
    np.cumsum(gain_K[::-1], out=gain_left_K[:-1][::-1])
    np.cumsum(cost_K[::-1], out=cost_left_K[:-1][::-1])
    last = int(np.argmin(gain_left_K[:-1] / cost_left_K[:-1]))
    edges = np.append(np.arange(last + 1), steps)
    while True:
        costs = cost_left_K[edges[:-1]] - cost_left_K[edges[1:]]
        gains = gain_left_K[edges[:-1]] - gain_left_K[edges[1:]]
        is_late = gains[1:-1] * costs[:-2] > gains[:-2] * costs[1:-1]
        if not is_late.any():
            return np.repeat(_rates(costs, gains), edges[1:] - edges[:-1])
        edges = np.delete(edges, np.flatnonzero(is_late) + 1)
