"""MGAA (reconstruction): between sublayers by cosine, within by energy (arXiv 2507.03294).

Indices: S sublayers, K steps of a linear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.scale import find_scale
from orchestrator.allocate.steps import EVERY_RANK, spend, step_costs
from orchestrator.errors import InfeasibleError, InputError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_choice, check_number

RULES = ("power", "softmax", "linear", "retain")


@dataclass(frozen=True, slots=True, kw_only=True)
class MgaaAllocator(Allocator):
    """MGAA, reconstructed: the paper's formula from cosine to kept fraction is not public.

    The abstract of Multi-Granular Adaptive Allocation gives two principles, implemented here:

    1. Between sublayers (the attention or the MLP part of a block) the kept fraction follows the
       cosine c between the residual stream before and after it: the more similar, the less is kept.
       The rules below are ours; each is scaled so that the fractions, weighted by size, meet the
       budget. Cosines are clamped to [0, 1].
    2. Within a sublayer all matrices retain the same fraction of their energy E(k), the sum of the
       k largest squared singular values over the sum of all, in the norm of the method. Solved
       exactly in integers: the next rank always goes to the linear with the least captured energy,
       until the next rank does not fit. No other ranks within the sublayer's share have a larger
       minimum of the retained energy. A linear that reaches break-even becomes dense, at the cost
       of the dense weight, so the share of the others is exact.

    The unused part of a sublayer's share is smaller than its next rank. With `leftover="largest"`
    the unused parts of all sublayers together pay for next ranks, in ascending order of the
    relative excess over the share, until the next one does not fit; a share and its bounds are
    exceeded by less than one rank. With `slack` they stay unused: then every rank and the stored
    total grow with the budget, and the modelled loss falls.
    """

    source: ClassVar[str] = "arXiv 2507.03294"
    reconstruction: ClassVar[str] = (
        "Of arXiv 2507.03294 two principles are known; the rule from cosine to fraction is ours."
    )
    needs_cosines: ClassVar[bool] = True
    rule: Literal["power", "softmax", "linear", "retain"] = "power"
    """Kept ∝ (1 − c)^t (`power`) or the angle arccos(c) (`retain`); removed ∝
    exp(c / temperature) (`softmax`) or c (`linear`)."""
    t: float = 0.5
    """Exponent of `power`; 0 is uniform, 1 is proportional to 1 − c."""
    temperature: float = 0.1
    """Temperature of `softmax`; larger is closer to uniform."""
    low: float = 0.3
    """Smallest kept fraction of a sublayer."""
    high: float = 0.98
    """Largest kept fraction of a sublayer."""
    leftover: Literal["largest", "slack"] = "largest"
    """Use of values too few for a further rank of their sublayer."""

    def __post_init__(self) -> None:
        check_choice("mgaa: rule", self.rule, RULES)
        check_number("mgaa: t", self.t, 0, 100)
        check_number("mgaa: temperature", self.temperature, 0.001, 1000)
        check_number("mgaa: high", self.high, 0, 1)
        check_number("mgaa: low", self.low, 0, self.high)
        check_choice("mgaa: leftover", self.leftover, ("largest", "slack"))

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: As `Budget.total`; also if the kept fraction is outside the bounds, or
                a sublayer's share is below rank 1 for each of its linears.
            InputError: The cosine of a sublayer is missing or not finite.
        """
        total, kept, ranks = budget.total(linears), budget.kept, budget.ranks
        if not self.low <= kept <= self.high:
            raise InfeasibleError(
                f"keep: {kept} is outside [{self.low}, {self.high}], the bounds of mgaa for a "
                f"sublayer; {'lower its low' if kept < self.low else 'raise its high'}"
            )
        sublayers: dict[str, list[Linear]] = {}
        for linear in linears:
            sublayers.setdefault(linear.sublayer, []).append(linear)
        cosine_S = np.array([_cosine(cosines, name) for name in sublayers])
        size_S = np.array([sum(each.values for each in part) for part in sublayers.values()])
        kept_S = self.kept_fractions(cosine_S, size_S, total)

        assignments: dict[str, Assignment] = {}
        following: list[tuple[float, int, Linear]] = []
        for (name, part), share in zip(sublayers.items(), kept_S * size_S, strict=True):
            keys = [captured(linear, curves[linear.name], ranks) for linear in part]
            # bisection may end just below an integer; corrects less than one value in total
            values = math.floor(share * (1 + 1e-13))
            taken = spend(part, keys, values, where=f"sublayer {name}", ranks=ranks)
            assignments |= taken
            left = share - sum(taken[each.name].stored_values(each) for each in part)
            if step := _next_step(part, keys, taken, ranks):
                linear, cost = step
                following.append(((cost - left) / cost, cost, linear))
        if self.leftover == "largest":
            stored = sum(assignments[each.name].stored_values(each) for each in linears)
            for _, cost, linear in sorted(following, key=lambda step: step[0]):
                if stored + cost > total:
                    break
                stored += cost
                assignments[linear.name] = _larger(linear, assignments[linear.name], ranks)
        return make_plan(linears, assignments, total)

    def kept_fractions(self, cosine_S: np.ndarray, size_S: np.ndarray, budget: float) -> np.ndarray:
        """Compute the kept fraction of each sublayer, [S], within the bounds.

        The sum weighted by size meets the budget from below, up to rounding. Each fraction grows
        with the budget; equal cosines give equal fractions.
        """
        cosine_S = np.clip(cosine_S, 0, 1)
        if self.rule in ("power", "retain"):
            power = self.rule == "power"
            score_S = (1 - cosine_S) ** self.t if power else np.arccos(cosine_S)
            kept_S, _ = find_scale(score_S, size_S, budget, low=self.low, high=self.high)
            return kept_S
        distance_S = (cosine_S - cosine_S.max()) / self.temperature
        score_S = np.exp(distance_S) if self.rule == "softmax" else cosine_S
        removed = float(size_S.sum() - budget)
        _, removed_S = find_scale(score_S, size_S, removed, low=1 - self.high, high=1 - self.low)
        return np.asarray(np.clip(1 - removed_S, self.low, self.high))


def _next_step(
    part: Sequence[Linear],
    keys: Sequence[np.ndarray],
    taken: Mapping[str, Assignment],
    ranks: AllowedRanks,
) -> tuple[Linear, int] | None:
    """Return the linear of a sublayer that gets the next step, and the additional values of that
    step."""
    waiting = [
        (float(key[taken[linear.name].rank // ranks.step(linear)]), linear)
        for linear, key in zip(part, keys, strict=True)
        if taken[linear.name].form != "dense"
    ]
    if not waiting:
        return None
    _, linear = min(waiting, key=lambda pair: pair[0])
    steps = taken[linear.name].rank // ranks.step(linear)
    return linear, int(step_costs(linear, ranks)[steps])


def _larger(linear: Linear, assignment: Assignment, ranks: AllowedRanks) -> Assignment:
    """Return the assignment one step larger."""
    rank = assignment.rank + ranks.step(linear)
    if rank >= ranks.form.break_even(linear):
        return Assignment(form="dense")
    return replace(assignment, rank=rank)


def captured(linear: Linear, curve: Curve, ranks: AllowedRanks = EVERY_RANK) -> np.ndarray:
    """Return the fraction of the energy captured before each step, ascending from 0, [K].

    For a linear without energy it is 1 from rank 1 on.
    """
    ends = ranks.of(linear)
    if curve.total <= 0:
        return np.minimum(np.arange(len(ends) + 1), 1.0)
    energy_K = np.concatenate([[0.0], np.cumsum(curve.energies[: ends.max(initial=0)])[ends - 1]])
    fraction_K: np.ndarray = energy_K / curve.total
    return fraction_K


def _cosine(cosines: Mapping[str, float], sublayer: str) -> float:
    cosine = cosines.get(sublayer, math.nan)
    if not math.isfinite(cosine):
        raise InputError(
            f"sublayer {sublayer}: its cosine is {cosines.get(sublayer, 'missing')}; mgaa needs "
            "a finite one for every sublayer, from calibration"
        )
    return cosine
