"""Directions by gates that a loss polarises at one size; kept ones may be amplified.

Indices: N gates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.base import GateAllocator, GateKind
from orchestrator.allocate.gates.scores import plan_of_scores
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.cost import VALUES
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.recipe.options import check_choice, check_number, check_whole

SHARES = (0.5, 0.25, 0.25)
"""Fractions of the steps in the three phases."""
WAVES = 4
"""Oscillations of the polarisation's weight in the second phase."""
HEIGHT = 0.1
"""Largest weight in the second phase, as a fraction of the last one."""

WITHIN = 0.02
"""Distance of the kept fraction from its target within which the slope of the size is linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soco(GateAllocator):
    """SoCo, a reconstruction: gates from 0 to 2 that a loss drives to 0 or to 1 and above.

    Every direction of every linear has a gate, and so has its tail, all that the stored directions
    leave of the weight. Gates begin at 1, where the model is the dense one, and follow Adam on

        KL(dense || gated) + size |kept - target| + λ2(t) Σ w s̃ (1 - s̃),    s̃ = min(s, 1)

    (`models.training.polarised`). In the first half of the steps λ2 is 0: the size comes to its
    target by what the divergence minds least. In the next quarter λ2 oscillates below a tenth of
    `polarisation`, in the last one it rises to it, so that gates part at a half. A size takes steps
    of all linears in the order of their gates, as of `learned`, without further steps. At
    the target and below, the left factor of a kept direction is multiplied by its gate, its gain,
    which makes up for directions that are cut; above, directions with gates near 0 are kept too,
    and all as they are.

    With `budgets` the smallest one is the target, and each has gains of its own: the directions
    that the plan of this size keeps are trained as gates (`DirectionGains`) on the model's loss
    alone, without tails, for as many steps as the third phase has. Other gates are closed
    meanwhile, and dense linears have none. A size takes the gains of the nearest budget at or above
    it, where all that it keeps is kept too; above the largest one directions are as they are.

    Laws: all of `orchestrator.allocate`, with gates in place of curves.

    Reconstruction: of the original the abstract and a digest are known, not its losses, rates,
    lengths and weights of phases, and not its "deviation" term, which is missing here. The tail,
    the basis of the method and the training of gains are ours. Budgets are trained one after the
    other: they have no number in common, so drawing one of them for each step would do the same.

    Source: arXiv 2502.15092. O(n log n) in the number of directions.
    """

    source: ClassVar[str] = "arXiv 2502.15092"
    reconstruction: ClassVar[str] = (
        "Of arXiv 2502.15092 the abstract is known: losses, rates and lengths of phases are ours."
    )
    departure: ClassVar[str] = (
        "A reconstruction from the abstract: the form of gates, losses, rates and phases are "
        "ours; the `deviation` term is unknown and missing."
    )
    use: ClassVar[str] = (
        "To compare with: after sixty steps it lost more than `threshold`, which takes none, "
        "except on C4 at 0.4; more steps are not measured."
    )
    name: ClassVar[str] = "soco"
    gates: ClassVar[GateKind] = "polarised"
    target: float = 0.6
    """Kept fraction of values that the gates are driven to: the smallest size, and the largest one
    with gains, unless `budgets` are given."""
    budgets: str | float = ""
    """Kept fractions of values with gains of their own, ascending, the smallest one in place of
    `target`. Empty: the gates at the target are the gains."""
    rate: float = 0.02
    """Learning rate of Adam, on the logits of the gates."""
    size: float = 10.0
    """Weight of the distance of the kept fraction to its target, in nats."""
    polarisation: float = 5.0
    """Weight of the polarisation in the last step, in nats. Above `size` it would open gates of
    more than a half while too much is kept."""
    steps: int = 2000
    """Number of steps."""
    divergence: float = 1.0
    """Weight of KL(dense || gated), averaged over tokens."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy of the text's next tokens, averaged over predictions."""
    below_target: Literal["refuse", "allow"] = "refuse"
    """Sizes below the target, or below what the steps have reached: refused, or by the gates that
    are open at the end."""

    def __post_init__(self) -> None:
        GateAllocator.__post_init__(self)
        check_number("soco: target", self.target, 1e-3, 1)
        self._check_budgets()
        check_number("soco: rate", self.rate, 1e-6, 1)
        check_number("soco: size", self.size, 0, 1e6)
        check_number("soco: polarisation", self.polarisation, 0, 1e6)
        check_whole("soco: steps", self.steps, 1, 1_000_000)
        check_choice("soco: below_target", self.below_target, ("refuse", "allow"))
        if not self.divergence and not self.cross_entropy:
            raise UsageError(
                "soco: divergence and cross_entropy are 0, and the size alone would close gates "
                "without regard to the model; one must be above 0"
            )

    def _check_budgets(self) -> None:
        text = 'it must be ascending numbers like "0.4 0.6 0.8"'
        if isinstance(self.budgets, bool):
            raise UsageError(f"soco: budgets is {self.budgets!r}; {text}")
        try:
            found = self.gain_budgets
        except ValueError as error:
            raise UsageError(f"soco: budgets is {self.budgets!r}; {text}") from error
        if sorted(set(found)) != [*found]:
            raise UsageError(f"soco: budgets is {self.budgets!r}; {text}")
        for each in found:
            check_number("soco: budgets", each, 1e-3, 1)

    @property
    def gain_budgets(self) -> tuple[float, ...]:
        """Budgets with gains of their own, ascending."""
        return tuple(float(word) for word in str(self.budgets).replace(",", " ").split())

    @property
    def smallest(self) -> float:
        """Kept fraction that the gates are driven to."""
        return min(self.gain_budgets, default=self.target)

    def decisive(self) -> dict[str, Any]:
        """Options that decide the gates."""
        options = asdict(self) | {"loss": "polarised", "target": self.smallest}
        del options["below_target"], options["budgets"]
        return options

    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Return the slope of the size's term and the weight of the polarisation in a step."""
        pull = pull_at(kept, self.smallest, self.size)
        return pull, polarisation_at(step, self.steps, self.polarisation)

    def ends_at(self, kept: float) -> bool:
        """Return False: all steps are taken."""
        return False

    def gain_budget(self, kept: float) -> float | None:
        """Return the nearest budget at or above a size, the target if there is none but it."""
        budgets = self.gain_budgets or (self.target,)
        return min((each for each in budgets if each >= kept), default=None)

    def of_gains(self) -> "SocoGains":
        """Return the course of the gains of one budget."""
        return SocoGains(**asdict(self) | {"steps": max(round(SHARES[-1] * self.steps), 1)})

    def scoring_passes(self, num_linears: int) -> float:
        """Return three passes for a sequence of a step: forward, forward again, and back; those of
        gains, in a smaller model, are counted as the others."""
        steps = self.steps + len(self.gain_budgets) * self.of_gains().steps
        return 3.0 * steps * self.batch

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of `Budget.total`, and UsageError for a size below the target."""
        budget.total(linears)
        least, option = self.smallest, "soco.budgets" if self.budgets else "soco.target"
        if self.below_target == "refuse" and budget.cost is VALUES and budget.kept < least:
            raise UsageError(
                f"keep: {budget.kept} is below {least}, the size that {option} learns; keep more, "
                f"give {option} a lower one, or soco.below_target=allow"
            )

    def check_reached(self, kept: float, budget: Budget) -> None:
        """Raise InfeasibleError for a size that would close gates of which none has parted."""
        is_missed = self.below_target == "refuse" and budget.cost is VALUES
        if is_missed and budget.kept < kept - WITHIN:
            raise InfeasibleError(
                f"keep: {budget.kept} closes gates that the loss left open; {self.steps} steps "
                f"keep {kept:.4f}, and soco was to reach {self.smallest}; take more steps "
                "(soco.steps) or larger ones (soco.rate), keep more, or give "
                "soco.below_target=allow"
            )

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan that keeps the directions of the largest gates.

        Raises:
            InfeasibleError: As `Budget.total`.
            InputError: Gates of a linear are missing.
        """
        return plan_of_scores(linears, curves, budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocoGains(Soco):
    """Course of gains under a plan: steps by the model's loss alone, without other terms."""

    gates: ClassVar[GateKind] = "gains"

    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Return no weight of a size and of a polarisation."""
        return 0.0, 0.0


def polarisation_at(step: int, steps: int, last: float) -> float:
    """Return the weight λ2 of the polarisation in a step, counted from 1, of `steps`.

    It is 0 in the first phase; HEIGHT last (1 - cos(2π WAVES u)) / 2 in the second, u from 0 to 1
    over it; and rises linearly from 0 to `last` over the third, reached in the last step. A
    function of the step alone.
    """
    explored, refined = SHARES[0] * steps, (SHARES[0] + SHARES[1]) * steps
    if step <= explored:
        return 0.0
    if step <= refined:
        place = (step - explored) / (refined - explored)
        return HEIGHT * last * (1 - math.cos(2 * math.pi * WAVES * place)) / 2
    return last * (step - refined) / (steps - refined)


def pull_at(kept: float, target: float, weight: float) -> float:
    """Return the slope of weight · |kept - target| by the kept fraction, its kink rounded.

    It is linear within `WITHIN` of the target, where a slope of two values would fill Adam's second
    moments and drown the polarisation.
    """
    return weight * min(max((kept - target) / WITHIN, -1.0), 1.0)
