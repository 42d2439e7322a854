"""The path of one rising threshold: curves corrected by the gated model, gains for every size.

Indices: K directions of a linear, S = K + 1 steps of it, the last one its dense weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from orchestrator.allocate.gates.base import GateKind
from orchestrator.allocate.gates.stopped import StoppedGates
from orchestrator.allocate.steps import step_costs
from orchestrator.allocate.threshold import Threshold
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.curve import Curve, PathCurve
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import check_choice, check_number

LEAST = 0.5
"""Kept fraction of the last threshold, by the curves alone, over `stop`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdPath(StoppedGates):
    """The plans of one rising threshold, with the loss of the gated model to correct the curves.

    `threshold` closes step i of linear l where v_li, the loss that the curve says it takes away per
    value, is below τ. Curves of `two-sided` are in nats, but take every cut alone. Here τ rises in
    small steps, and the gates of the steps that it closes stay closed; the gradients h of the gates
    of the model so cut say what it would gain by opening them again. To second order, and without
    other cuts, -Σ h over the closed gates of a linear is 2 E_l, E_l the loss by its curve. So

        κ_l = (P - Σ_t m^t n Σ h) / (P + Σ_t m^t n 2 E_l),    P = 4,    0.2 <= κ_l <= 5,

    over the steps so far, the last one first, each of n tokens, corrects the curve: steps are
    closed where κ_l v_li <= τ. Without evidence κ_l is 1, with a standard deviation of a half.

    A kept direction of a cut linear has a gain s in place of 1, the mode of the posterior of

        N · cross-entropy + Σ (s - 1)² / (2 prior²),    N the number of learned tokens,

    which is followed by steps that its diagonal curvature scales, 2 N e of a direction of energy e:

        m <- m + 0.1 (h - m),    s <- s - rate (N m + (s - 1) / prior²) / (2 N e + 1 / prior²).

    Gains at a snapshot are means of s over steps, the last ones first. A size takes the gains of
    the nearest snapshot; next to the dense model it has none.

    So one path gives every size down to `stop`, from some dozens of steps, where `learned` takes
    thousands: what is known in closed form is not learned.

    Laws: all of `orchestrator.allocate`, with scores in place of curves.

    Derived here, after ACIP (2502.01717), which has the one run for all sizes. O(n log n) in the
    number of directions.
    """

    departure: ClassVar[str] = (
        "Derived here, after ACIP, which has the one run for all sizes: curves in closed form and "
        "one factor a linear in place of a score a direction."
    )
    use: ClassVar[str] = (
        "For many sizes from one run, and for less loss than `threshold` at each; for one size "
        "alone give it as `path.stop`, which takes fewer steps."
    )
    name: ClassVar[str] = "path"
    gates: ClassVar[GateKind] = "thresholds"
    step: float = 0.01
    """Kept fraction by which the plans of two steps differ, by the curves alone."""
    gains: Literal["yes", "no"] = "yes"
    """Gains of the kept directions, or none."""
    prior: float = 0.1
    """Standard deviation of the gains before the text is seen."""
    rate: float = 0.3
    """Fraction of a Newton step by which gains move."""
    memory: float = 0.9
    """Weight of a step's gradients in κ, over that of the next step's."""
    every: int = 4
    """Steps between snapshots, each of which has gains of its own."""

    def __post_init__(self) -> None:
        StoppedGates.__post_init__(self)
        check_number("path: step", self.step, 1e-5, 1)
        check_choice("path: gains", self.gains, ("yes", "no"))
        check_number("path: prior", self.prior, 1e-6, 10)
        check_number("path: rate", self.rate, 1e-6, 1)
        check_number("path: memory", self.memory, 0, 0.999999)
        check_number("path: cross_entropy", self.cross_entropy, 1e-6, 1e6)

    @property
    def steps(self) -> int:
        """Largest number of steps: until the curves alone keep half of `stop`."""
        return math.ceil((1 - LEAST * self.stop) / self.step)

    def decisive(self) -> dict[str, Any]:
        """Options that decide scores and gains."""
        return StoppedGates.decisive(self) | {"loss": "path"}

    def begin(
        self, linears: Sequence[Linear], curves: Mapping[str, Curve], form: Form, tokens: int
    ) -> "FollowedPath":
        """Return the course of the thresholds, those of plans by the curves alone.

        Args:
            tokens: Number of calibration tokens.
        """
        ranks = AllowedRanks(form)
        key = np.concatenate([_keys(each, curves[each.name], ranks) for each in linears])
        cost = np.concatenate([step_costs(each, ranks) for each in linears])
        order = np.argsort(key, kind="stable")
        kept = np.cumsum(cost[order]) / cost.sum()
        wanted = 1 - self.step * np.arange(1, self.steps + 1)
        # the first step that is not kept; keys are costs per gain
        found = np.minimum(np.searchsorted(kept, wanted, side="right"), len(order) - 1)
        with np.errstate(divide="ignore"):
            thresholds = _nats(tokens) / key[order][found]
        return FollowedPath(**asdict(self), thresholds=tuple(thresholds.tolist()))

    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Raise TypeError: thresholds are those of `begin`."""
        raise TypeError("path: thresholds are known after begin() alone")

    @property
    def snapshot_gains(self) -> bool:
        return self.gains == "yes"

    @property
    def expected_steps(self) -> int:
        """Steps until the curves alone keep `stop`."""
        return max(math.ceil((1 - self.stop) / self.step), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedPath(ThresholdPath):
    """Path whose thresholds are known, by the curves of a model."""

    thresholds: tuple[float, ...]
    """Loss in nats a token and value, by step, below which a step of a linear is closed."""

    def weights_at(self, step: int, kept: float) -> tuple[float, float]:
        """Return the threshold of a step, counted from 1, and no polarisation."""
        return self.thresholds[step - 1], 0.0


def path_curve(linear: Linear, curve: Curve, form: Form, tokens: int) -> PathCurve:
    """Return the curve of a linear in nats a token.

    Args:
        curve: Its unit is half a nat over all calibration tokens, as that of `two-sided`.
        tokens: Number of calibration tokens.
    """
    ranks = AllowedRanks(form)
    unit, count = _nats(tokens), ranks.count(linear)
    key_S = _keys(linear, curve, ranks)
    with np.errstate(divide="ignore"):
        worth_S = unit / key_S
    worth_S[0] = np.inf
    energy_K = unit * curve.energies[:count]
    loss_S = np.maximum(unit * curve.total - np.concatenate([[0.0], np.cumsum(energy_K)]), 0.0)
    return PathCurve(worth_S, energy_K, loss_S)


def _nats(tokens: int) -> float:
    """Return the nats a token of one unit of a curve."""
    return 1 / (2 * max(tokens, 1))


def _keys(linear: Linear, curve: Curve, ranks: AllowedRanks) -> np.ndarray:
    """Return the cost per gain of every step, [S], ascending; 0 of the first one."""
    key_S: np.ndarray = np.maximum(
        Threshold().keys(linear, curve, ranks), np.finfo(np.float64).tiny
    )
    key_S[0] = 0.0
    return key_S
