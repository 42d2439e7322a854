"""Plans by the scores of directions: any size is a prefix of one order of the model.

Indices: K directions of a linear, S steps of it, the last one its dense weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.steps import spend, step_costs
from orchestrator.errors import InputError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan


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


def open_cost(linear: Linear, curve: Curve, ranks: AllowedRanks) -> int:
    """Cost of the steps whose gates are open at the end of the learning."""
    return int(step_costs(linear, ranks)[: learned_steps(linear, curve, ranks).open].sum())


def _taken(linear: Linear, assigned: Assignment, ranks: AllowedRanks) -> int:
    """Number of steps that an assignment has taken."""
    if assigned.form == "dense":
        return ranks.count(linear) + 1
    return assigned.rank // ranks.step(linear)


def _keys(steps: Sequence[LearnedSteps]) -> Iterator[np.ndarray]:
    """Places of all steps in the order of scores, then of energy per cost; they never descend."""
    score = np.concatenate([each.score_S for each in steps])
    value = np.concatenate([each.value_S for each in steps])
    place = np.empty(len(score))
    place[np.lexsort((-value, -score))] = np.arange(len(score))
    ends = np.cumsum([len(each.score_S) for each in steps])
    for part in np.split(place, ends[:-1]):
        yield np.maximum.accumulate(part)
