"""Directions in the order in which an L1 pull closes their gates (ACIP)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.base import GateKind
from orchestrator.allocate.gates.stopped import StoppedGates
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.recipe.options import check_choice, check_number, check_whole

ENDING_PENALTY = 2e-5 * 1.01**750
"""Weight of the L1 term at which a learning is expected to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned(StoppedGates):
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
    steps: int = 20_000
    """Largest number of steps."""
    penalty_by: Literal["cost", "count"] = "cost"
    """Weight of a gate in the L1 term: by the values that it saves, or 1."""
    tail: Literal["gate", "full"] = "gate"
    """Above break-even one gate for all that the stored directions leave, or one for each of the
    min(O, I) directions, which the paper has."""
    adapters: int = 0
    """Rank of the adapter of every linear, which is trained beside the gates; the paper has 32."""

    def __post_init__(self) -> None:
        StoppedGates.__post_init__(self)
        check_number("learned: rate", self.rate, 1e-6, 1)
        check_number("learned: penalty", self.penalty, 1e-12, 1e6)
        check_number("learned: growth", self.growth, 1, 10)
        check_whole("learned: growth_every", self.growth_every, 1, 1_000_000)
        check_whole("learned: steps", self.steps, 1, 1_000_000)
        check_choice("learned: penalty_by", self.penalty_by, ("cost", "count"))
        check_whole("learned: adapters", self.adapters, 0, 100_000)
        check_choice("learned: tail", self.tail, ("gate", "full"))
        if not self.cross_entropy:
            raise UsageError(
                "learned: cross_entropy is 0, and a divergence from the dense model has no "
                "gradient where all gates are open: they would close together; give more than 0"
            )

    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Return the weight of the L1 term in a step, counted from 1, a function of it alone."""
        return self.penalty * self.growth ** ((step - 1) // self.growth_every), 0.0

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
        StoppedGates.check_budget(self, linears, budget)
        most = [budget.form.break_even(each) - 1 for each in linears]
        for linear, ranks in zip(linears, most, strict=True):
            if 0 < ranks <= self.adapters:
                raise UsageError(
                    f"learned: adapters is {self.adapters}, and {linear.name} has {ranks} ranks "
                    "below break-even, one of which must be left for a direction; give fewer, or "
                    "--ignore it"
                )

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan that keeps the directions of the highest scores.

        Raises:
            InfeasibleError, InputError: As `StoppedGates`.
            InfeasibleError: The budget does not hold all adapters and a direction of each.
        """
        plan = StoppedGates.__call__(self, linears, curves, budget, cosines)
        ranks = [each.rank for each in plan.assignments.values() if each.form != "dense"]
        if self.adapters and min(ranks, default=self.adapters + 1) <= self.adapters:
            raise InfeasibleError(
                f"{budget.cost.field}: {budget.kept} holds rank {min(ranks)} of a linear, and its "
                f"adapter and one direction have {self.adapters + 1}: keep more"
            )
        return plan
