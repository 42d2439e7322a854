"""Directions by scores that are learned once: any size is a prefix of one order of the model.

Indices: K directions of a linear, S steps of it, the last one its dense weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.scored import GateAllocator, GateKind
from orchestrator.allocate.steps import spend, step_costs
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.cost import VALUES
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_choice, check_number, check_whole

ENDING_PENALTY = 2e-5 * 1.01**750
"""Weight of the L1 term at which a learning is expected to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned(GateAllocator):
    """ACIP: directions in the order in which an L1 pull closes their gates; the last ones stay.

    Every direction of every linear has a gate that is open while its score s is above 0, and so has
    the tail, all that the stored directions leave of the weight, without which the linear is cut.
    Scores begin at 1, where the model is the dense one, and follow Adam on

        cross-entropy of the text + λ_t Σ w relu(s),    λ_t = penalty · growth^⌊t / growth_every⌋,

    with the gradient of an open gate for that of its score. Closed gates stay closed. A score is s
    of an open gate, and −(T − t + 1) of one that closed in step t of T; ties are in order of the
    energy per value. A size takes steps of all linears in the order of their scores, so what a
    smaller budget keeps is part of what a larger one keeps, and no size needs another training.
    The learning ends at the first snapshot (of every `every` steps) at which open gates store no
    more than `stop`. Below the size that it has reached the order would be that of open scores.

    w is the number of values that closing the gate saves, over its mean (`penalty_by` "cost"), or 1
    ("count"). While the tail is open a linear is stored dense, and what its closed directions would
    save is counted as the tail's; directions that close before it are kept until it closes.

    With `tail` "full" every one of the min(O, I) directions has a gate, as published; those behind
    the stored ones are the SVD of the rest of the weight, made when a shard opens. A linear is
    dense while as many gates are open as break-even has ranks, whichever they are: its tail has
    the score of the best direction of which that is no longer true. Directions that are not stored
    count for that alone, and are gone once the linear is cut.

    With `adapters` a every linear has a term B A x / 2 of rank a, B = 0 at the start, that Adam
    trains beside the gates, at 0.02 times their rate: in the authors' units both have one rate. A
    cut of rank r is the adapter and the best r - a directions, [B / 2, U] and [A; D], so that
    adapters count in the size and all sizes share them; a linear that stays dense loses its own.

    Adam divides by the size of the gradients, so their noise takes every score, whatever its
    importance, about rate · √T away from its course: a schedule may not be much shorter.

    Laws: all of `orchestrator.allocate`, with scores in place of curves.

    Departures from the authors' code: the scores are in units where they begin at 1, and Adam's
    epsilon with them; the basis is that of the method (`svd` has the paper's); by default a tail in
    place of the directions above break-even, which save no values; by default costs in the penalty
    and no adapters, which here have no dropout and count in the size; no second training. The data
    set, the length of sequences and bfloat16 are those of the recipe.

    Source: arXiv 2502.01717. O(n log n) in the number of directions.
    """

    source: ClassVar[str] = "arXiv 2502.01717"
    departure: ClassVar[str] = (
        "Scores begin at 1, in the basis of the method; the penalty is by values, with one gate "
        "for a tail and without adapters (`learned.penalty_by=count`, `tail=full` and "
        "`adapters=32` restore the paper's); no second training."
    )
    use: ClassVar[str] = (
        "To compare with: thousands of steps, where `path` takes some dozens, and `threshold`, "
        "which lost less than a short schedule in our results, takes none."
    )
    name: ClassVar[str] = "learned"
    gates: ClassVar[GateKind] = "pulled"
    rate: float = 2.5e-3
    """Learning rate of Adam: a gate that is pulled down all the time closes in 1 / rate steps."""
    penalty: float = 2e-5
    """Weight of the L1 term in the first step."""
    growth: float = 1.01
    """Factor of that weight, once every `growth_every` steps."""
    growth_every: int = 4
    stop: float = 0.4
    """Kept fraction of values at which the learning ends: the smallest size that is learned."""
    steps: int = 20_000
    """Largest number of steps."""
    penalty_by: Literal["cost", "count"] = "cost"
    """Weight of a gate in the L1 term: by the values that it saves, or 1."""
    tail: Literal["gate", "full"] = "gate"
    """Above break-even one gate for all that the stored directions leave, or one for each of the
    min(O, I) directions, which the paper has."""
    adapters: int = 0
    """Rank of the adapter of every linear, which is trained beside the gates; the paper has 32."""
    below_stop: Literal["refuse", "allow"] = "refuse"
    """Sizes below the smallest learned one: refused, or by the scores of open gates."""

    def __post_init__(self) -> None:
        # slots=True makes the class anew, which super() does not see
        GateAllocator.__post_init__(self)
        check_number("learned: rate", self.rate, 1e-6, 1)
        check_number("learned: penalty", self.penalty, 1e-12, 1e6)
        check_number("learned: growth", self.growth, 1, 10)
        check_whole("learned: growth_every", self.growth_every, 1, 1_000_000)
        check_number("learned: stop", self.stop, 1e-3, 1)
        check_whole("learned: steps", self.steps, 1, 1_000_000)
        check_choice("learned: penalty_by", self.penalty_by, ("cost", "count"))
        check_whole("learned: adapters", self.adapters, 0, 100_000)
        check_choice("learned: tail", self.tail, ("gate", "full"))
        check_choice("learned: below_stop", self.below_stop, ("refuse", "allow"))
        if not self.cross_entropy:
            raise UsageError(
                "learned: cross_entropy is 0, and a divergence from the dense model has no "
                "gradient where all gates are open: they would close together; give more than 0"
            )

    def decisive(self) -> dict[str, Any]:
        """Options that decide the scores."""
        options = asdict(self)
        del options["below_stop"]
        return options

    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Return the weight of the L1 term in a step, counted from 1, a function of it alone."""
        return self.penalty * self.growth ** ((step - 1) // self.growth_every), 0.0

    def ends_at(self, kept: float) -> bool:
        """Test if a kept fraction of open gates is small enough."""
        return kept <= self.stop

    @property
    def expected_steps(self) -> int:
        """Steps until λ is what it is after 3,000 of the authors' schedule, which ends after 2,000
        to 4,000; an estimate."""
        if self.growth == 1:
            return self.steps
        grown = math.log(max(ENDING_PENALTY / self.penalty, 1)) / math.log(self.growth)
        return min(max(round(self.growth_every * grown), round(1 / self.rate)), self.steps)

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `Budget.total`, and UsageError for a size below `stop` or adapters
        that leave no rank to directions."""
        budget.total(linears)
        most = [budget.form.break_even(each) - 1 for each in linears]
        for linear, ranks in zip(linears, most, strict=True):
            if 0 < ranks <= self.adapters:
                raise UsageError(
                    f"learned: adapters is {self.adapters}, and {linear.name} has {ranks} ranks "
                    "below break-even, one of which must be left for a direction; give fewer, or "
                    "--ignore it"
                )
        check_stop("learned", self.stop, self.below_stop, budget)

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan that keeps the directions of the highest scores.

        Raises:
            InfeasibleError: As `Budget.total`; or the budget does not hold all open gates, and
                `below_stop` refuses; or it does not hold all adapters and a direction of each.
            InputError: Scores of a linear are missing.
        """
        plan = plan_of_learned(linears, curves, budget, name="learned", below_stop=self.below_stop)
        ranks = [each.rank for each in plan.assignments.values() if each.form != "dense"]
        if self.adapters and min(ranks, default=self.adapters + 1) <= self.adapters:
            raise InfeasibleError(
                f"{budget.cost.field}: {budget.kept} holds rank {min(ranks)} of a linear, and its "
                f"adapter and one direction have {self.adapters + 1}: keep more"
            )
        return plan


def check_stop(name: str, stop: float, below_stop: str, budget: Budget) -> None:
    """Raise UsageError for a budget of values below the size that a learning ends at."""
    if below_stop == "refuse" and budget.cost is VALUES and budget.kept < stop:
        raise UsageError(
            f"keep: {budget.kept} is below {stop}, where {name}.stop ends the learning; "
            f"keep more, give a lower {name}.stop, or {name}.below_stop=allow"
        )


def plan_of_learned(
    linears: Sequence[Linear],
    curves: Mapping[str, Curve],
    budget: Budget,
    *,
    name: str,
    below_stop: str,
) -> Plan:
    """Return the plan that keeps the directions of the highest scores, if all open gates fit.

    Args:
        name: Allocation, for messages.
        below_stop: "allow": whether they fit or not.

    Raises:
        InfeasibleError: As `Budget.total`; or the budget does not hold all open gates.
        InputError: Scores of a linear are missing.
    """
    plan = plan_of_scores(linears, curves, budget)
    if below_stop == "refuse" and extrapolates(linears, curves, plan, budget.ranks):
        steps = [learned_steps(each, curves[each.name], budget.ranks) for each in linears]
        open_steps = zip(linears, steps, strict=True)
        least = sum(_open_cost(linear, each, budget.ranks) for linear, each in open_steps)
        dense = sum(map(budget.cost.dense, linears))
        raise InfeasibleError(
            f"{budget.cost.field}: {budget.kept} closes gates that learning left open, and "
            f"their order is not learned; the smallest learned size is {least / dense:.6f}: "
            f"keep more, learn further ({name}.stop, or more steps), or give "
            f"{name}.below_stop=allow"
        )
    return plan


def plan_of_scores(linears: Sequence[Linear], curves: Mapping[str, Curve], budget: Budget) -> Plan:
    """Return the plan that keeps the directions of the highest scores.

    Raises:
        InfeasibleError: As `Budget.total`.
        InputError: Scores of a linear are missing.
    """
    total = budget.total(linears)
    steps = [learned_steps(each, curves[each.name], budget.ranks) for each in linears]
    taken = spend(linears, _keys(steps), total, where="the model", ranks=budget.ranks)
    return make_plan(linears, taken, total, budget.cost)


class LearnedSteps(NamedTuple):
    """Steps of a linear, its dense weight last, with what orders them."""

    score_S: np.ndarray
    """Scores, float64, descending."""
    value_S: np.ndarray
    """Energy per cost."""

    @property
    def open(self) -> int:
        """Number of steps whose gates are open at the end; at least the first."""
        return max(int(np.count_nonzero(self.score_S > 0)), 1)


def learned_steps(linear: Linear, curve: Curve, ranks: AllowedRanks) -> LearnedSteps:
    """Return the steps of a linear. A step of several ranks has the mean of their scores.

    Directions that closed before the tail have its score: until then the weight was whole.

    Args:
        curve: With scores of the directions, descending, and of the tail, and their energies.

    Raises:
        InputError: The curve has no scores.
    """
    count, size = ranks.count(linear), ranks.step(linear)
    # the measured cost of a step may be 0
    cost_S = np.maximum(step_costs(linear, ranks), 1)
    if not count:
        return LearnedSteps(np.ones(1), curve.total / cost_S)
    if curve.scores is None or len(curve.scores) <= count * size:
        found = 0 if curve.scores is None else len(curve.scores) - 1
        raise InputError(
            f"{curve.name}: {found} of {count * size} directions have learned scores; an "
            "allocation by scores needs those of its own stage"
        )
    *directions, tail = np.asarray(curve.scores, dtype=np.float64)
    score_K = np.maximum(np.asarray(directions[: count * size]), tail)
    energy_S = np.empty(count + 1)
    energy_S[:-1] = curve.energies[: count * size].reshape(count, size).sum(axis=1)
    energy_S[-1] = max(curve.total - float(energy_S[:-1].sum()), 0.0)
    score_S = np.append(score_K.reshape(count, size).mean(axis=1), tail)
    return LearnedSteps(score_S, energy_S / cost_S)


def extrapolates(
    linears: Sequence[Linear],
    curves: Mapping[str, Curve],
    plan: Plan,
    ranks: AllowedRanks,
) -> bool:
    """Test if a plan closes gates that were open at the end of the learning."""
    return any(
        _taken(each, plan.assignments[each.name], ranks)
        < learned_steps(each, curves[each.name], ranks).open
        for each in linears
    )


def _taken(linear: Linear, assigned: Assignment, ranks: AllowedRanks) -> int:
    """Number of steps that an assignment has taken."""
    if assigned.form == "dense":
        return ranks.count(linear) + 1
    return assigned.rank // ranks.step(linear)


def _open_cost(linear: Linear, steps: LearnedSteps, ranks: AllowedRanks) -> int:
    """Cost of the steps whose gates are open."""
    return int(step_costs(linear, ranks)[: steps.open].sum())


def _keys(steps: Sequence[LearnedSteps]) -> Iterator[np.ndarray]:
    """Places of all steps in the order of scores, then of energy per cost; they never descend."""
    score = np.concatenate([each.score_S for each in steps])
    value = np.concatenate([each.value_S for each in steps])
    place = np.empty(len(score))
    place[np.lexsort((-value, -score))] = np.arange(len(score))
    ends = np.cumsum([len(each.score_S) for each in steps])
    for part in np.split(place, ends[:-1]):
        yield np.maximum.accumulate(part)
