"""Search of ranks by losses of whole plans (Bolaco, arXiv 2405.10616): the plans to choose from.

Shape suffixes: N linears, G groups of linears.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.budget import Budget, assign_rank, make_plan
from orchestrator.allocate.scale import find_scale
from orchestrator.allocate.steps import spend_shares
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.cost import VALUES
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.recipe.options import check_choice, check_number, check_whole

Point = tuple[float, ...]
"""Coordinates of a plan in the space that is searched."""
ROUNDING = 1e-6
"""Part of a value by which a share may lie below a whole number because of rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchAllocator(Allocator):
    """Kept fractions by groups of linears, chosen by losses of the compressed model.

    A plan is a point z of few coordinates, one for each group: a type of linears (those of one
    role; q and k are one type) in one of `depths` parts of the model. A linear of group g keeps the
    fraction ρ = clip(b e^(z_g + s), low, 1) of its values, and rounds down to a rank; b is 1, or of
    `around = "threshold"` the fraction that `Threshold` gives it.

    - `space = "exact"` (default): s by bisection, so that every plan fills the budget, to less than
      a rank of each linear. A common summand of z changes no plan, so z of the first group is 0,
      and the others are within ±`spread`.
    - `space = "window"` (published): s = 0 and z = log ρ, where the plan stores between the budget
      and `window` of the dense values less; outside, s leads to the nearer end of that window.

    `stages.score_plans` measures plans on held-out text, `text`, and asks a sampler of Optuna for
    further points; the closed-form plans, uniform and that of `Threshold`, are measured first, and
    the result is the plan of the least loss, so never worse than these on this text. A direct call,
    without losses, gives the plan of equal coordinates.

    Laws: all of `orchestrator.allocate` for a direct call around uniform. A budget below `low`
    everywhere is an `InfeasibleError` too.

    O(n) for a plan, and that of `Threshold` if it is around it; a loss costs `sequences` passes.

    Departures from the authors' code: points outside of the window are moved to its end instead of
    drawn again; a fraction of 1 is the dense weight, not break-even rank; v is a type of its own
    instead of dense (`--ignore '*.v_proj'` for that); the loss is the mean cross-entropy, not the
    perplexity, with `divergence` times the KL divergence from the dense model, 0 instead of 1e-3;
    all of `text` counts, not the sequences whose loss varies most. The space `exact`, the start
    from closed forms and batches are ours.
    """

    source: ClassVar[str] = "arXiv 2405.10616"
    departure: ClassVar[str] = (
        "Plans fill the budget, closed forms are measured first, and the loss is the mean cross-"
        "entropy; `search.space=window` restores the published space."
    )
    use: ClassVar[str] = (
        "With held-out text, where curves of the method say little about the loss of the model: "
        "`bolaco` lost 0.5 to 0.75 nats less than with equal fractions, `two-sided` no less than "
        "with `threshold`."
    )
    scoring: ClassVar[Scoring] = Scoring.PLANS
    text: str = ""
    """Held-out text on which plans are compared, a file or source as for the calibration; read with
    the calibration's field, layout and sequence length."""
    sequences: int = 32
    """Number of its sequences, the first ones."""
    divergence: float = 0.0
    """Weight of the KL divergence from the dense model beside the cross-entropy of the text; a
    large one compares distributions alone. The published one is 0.001, beside the perplexity."""
    depths: int = 1
    """Parts of consecutive blocks with fractions of their own; 1 and 4 are published."""
    around: Literal["uniform", "threshold"] = "uniform"
    """Plan of equal coordinates: uniform as published, or that of the method's curves."""
    space: Literal["exact", "window"] = "exact"
    low: float = 0.2
    """Smallest kept fraction of a linear."""
    spread: float = 0.8
    """Largest coordinate of the exact space: at 0.8 a group keeps 0.45 to 2.2 times what the first
    one does. Of separable functions of 24 groups, 50 trials in ±1.6 found little."""
    window: float = 0.1
    """Width of the window below the budget, as a fraction of the dense values."""
    trials: int = 50
    """Number of measured plans, those of closed forms included."""
    batch: int = 8
    """Plans that are chosen at once. With the seed it decides the course; workers do not."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """Sampler of Optuna: Gaussian process as published, Parzen estimators, or random points to
    compare with. Of separable functions 50 trials gained as much by both in 6 groups, and by `gp`
    more than twice as much in 24."""

    def __post_init__(self) -> None:
        check_choice("search: around", self.around, ("uniform", "threshold"))
        check_choice("search: space", self.space, ("exact", "window"))
        check_choice("search: sampler", self.sampler, ("gp", "tpe", "random"))
        check_number("search: low", self.low, 1e-3, 1)
        check_number("search: divergence", self.divergence, 0, 1e6)
        check_number("search: spread", self.spread, 1e-3, 10)
        check_number("search: window", self.window, 0, 1)
        for name, least in (("sequences", 1), ("depths", 1), ("trials", 3), ("batch", 1)):
            check_whole(f"search: {name}", getattr(self, name), least, 10**6)
        if not isinstance(self.text, str):
            raise UsageError(f"search: text is {self.text!r}; it must be a file or a source")
        if self.around == "threshold" and self.space == "window":
            raise UsageError(
                "search: space is 'window', which is around uniform; leave around or space out"
            )

    def scoring_passes(self, num_linears: int) -> float:
        """Return the passes of all plans, and of the dense model if there is a divergence from it;
        each is through the whole model."""
        return float((self.trials + (self.divergence > 0)) * self.sequences)

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `total`, or of another cost than values those of `Budget.total`."""
        if budget.cost is VALUES:
            self.total(linears, budget)
        else:
            budget.total(linears)

    def total(self, linears: Sequence[Linear], budget: Budget) -> int:
        """Return the number of values that the linears may store together.

        Raises:
            InfeasibleError: As `Budget.total`; also if `low` of every linear stores more.
        """
        total = budget.total(linears)
        least = sum(self._least(linears, budget))
        if least > total:
            raise InfeasibleError(
                f"keep: {budget.kept} allows {total} values, but {self.low} of every linear, the "
                f"smallest of search, stores {least}; give a smaller search.low, or keep more"
            )
        return total

    def _least(self, linears: Sequence[Linear], budget: Budget) -> list[int]:
        """Return the values of the smallest share of each linear; it holds an allowed rank."""
        low, ranks = Budget(self.low), budget.ranks
        return [max(low.share([each]), ranks.least_cost(each)) for each in linears]

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan of equal coordinates.

        Raises:
            InfeasibleError: As `total`.
        """
        return self.plan(linears, curves, budget, self.even(linears, budget))

    def even(self, linears: Sequence[Linear], budget: Budget) -> Point:
        """Return the point of equal coordinates, the center of the search."""
        where = math.log(max(budget.kept, self.low)) if self.space == "window" else 0.0
        return (where,) * len(self.bounds(linears))

    def bounds(self, linears: Sequence[Linear]) -> tuple[tuple[float, float], ...]:
        """Return the least and the largest value of each coordinate; none if all is one group."""
        groups = len(self.groups(linears))
        if self.space == "window":
            return ((math.log(self.low), 0.0),) * groups
        return ((-self.spread, self.spread),) * (groups - 1)

    def groups(self, linears: Sequence[Linear]) -> dict[str, list[int]]:
        """Return the places of the linears of each group, by its name."""
        blocks, found = 1 + max(each.block for each in linears), dict[str, list[int]]()
        for place, linear in enumerate(linears):
            part = linear.block * self.depths // blocks
            name = type_of(linear) if self.depths == 1 else f"{type_of(linear)}, part {part + 1}"
            found.setdefault(name, []).append(place)
        return found

    def kept(self, linears: Sequence[Linear], plan: Plan) -> dict[str, float]:
        """Return the kept fraction of the values of each group."""
        stored = [plan.assignments[each.name].stored_values(each) for each in linears]
        dense = [each.values for each in linears]
        return {
            name: sum(stored[i] for i in places) / sum(dense[i] for i in places)
            for name, places in self.groups(linears).items()
        }

    def locate(self, linears: Sequence[Linear], plan: Plan) -> Point:
        """Return the point whose groups keep the fractions that they keep in any plan, about."""
        z_G = [math.log(max(kept, self.low)) for kept in self.kept(linears, plan).values()]
        if self.space == "exact":
            z_G = [z - z_G[0] for z in z_G[1:]]
        pairs = zip(z_G, self.bounds(linears), strict=True)
        return tuple(min(max(z, least), most) for z, (least, most) in pairs)

    def plan(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        point: Point,
    ) -> Plan:
        """Return the plan of a point, for a budget of values.

        Raises:
            InfeasibleError: As `total`.
        """
        total, form = self.total(linears, budget), budget.form
        size_N = np.array([each.values for each in linears], dtype=np.float64)
        least, score_N = self._least(linears, budget), self._scores(linears, curves, budget, point)
        low_N = np.array(least) / size_N
        if self.space == "window":
            own = float(np.clip(score_N, low_N, 1) @ size_N)
            total = max(min(total, math.floor(own)), total - int(self.window * size_N.sum()))
            total = max(total, sum(least))
        fraction_N, _ = find_scale(score_N, size_N, total, low=low_N, high=1.0)
        shares = [
            max(math.floor(share + ROUNDING), smallest)
            for share, smallest in zip((fraction_N * size_N).tolist(), least, strict=True)
        ]
        if any(budget.ranks.step(each) > 1 for each in linears):
            return make_plan(linears, spend_shares(linears, shares, total, budget.ranks), total)
        assignments = {
            each.name: assign_rank(each, form.rank_within(each, share), share, form)
            for each, share in zip(linears, shares, strict=True)
        }
        return make_plan(linears, assignments, total)

    def _scores(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        point: Point,
    ) -> np.ndarray:
        """Compute b e^z of each linear, float64 [N]."""
        z_G = point if self.space == "window" else (0.0, *point)
        score_N = np.ones(len(linears))
        if self.around == "threshold":
            base = Threshold()(linears, curves, budget, {}).assignments
            kept = [base[each.name].stored_values(each) / each.values for each in linears]
            score_N = np.array(kept, dtype=np.float64)
        for z, places in zip(z_G, self.groups(linears).values(), strict=True):
            score_N[places] *= math.exp(z)
        return score_N


def type_of(linear: Linear) -> str:
    """Return the type of a linear: its role, of an expert without its number; q and k are one."""
    role = f"{linear.experts}.{linear.part}" if linear.experts else linear.role
    return re.sub(r"\b[qk]_proj$", "qk_proj", role)
