"""Allocation: curves and the budget to the plan; milliseconds, no tensor."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from orchestrator.allocate.base import Scoring
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.by_bytes import fill_budget
from orchestrator.errors import InfeasibleError
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.stages.context.values import Decomposed, Planned, Scores, extended


def allocate(decomposed: Decomposed, scores: Scores) -> Planned:
    """Divide the budget over all linears, unless the scores have decided already.

    Raises:
        UsageError, InfeasibleError: As the allocator.
    """
    if scores.plan is not None:
        return extended(
            decomposed, Planned, plan=scores.plan, curves={}, scores=scores, multiples={}
        )
    curves = _curves(decomposed, scores)
    cosines = {
        sublayer: cosine["mean"]
        for facts in decomposed.facts.values()
        for sublayer, cosine in facts["cosines"].items()
    }
    grouping, linears = decomposed.grouping, decomposed.linears
    stacked = grouping.stacked(linears)

    def divide(budget: Budget) -> Plan:
        plan = decomposed.allocator(stacked, curves, budget, cosines)
        return grouping.spread(linears, plan)

    def planned(budget: Budget) -> Plan:
        return fill_budget(divide, linears, budget, decomposed.codec)

    plan = planned(decomposed.budget)
    multiples = _multiples(decomposed, plan, planned, curves)
    return extended(
        decomposed, Planned, plan=plan, curves=curves, scores=scores, multiples=multiples
    )


def _multiples(
    decomposed: Decomposed,
    plan: Plan,
    planned: Callable[[Budget], Plan],
    curves: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts about multiples of ranks, with their cost; empty if every rank is allowed.

    The predicted loss is the sum of the curves at the ranks of the plan, in the method's norm.
    """
    budget, stacked = decomposed.budget, decomposed.grouping.stacked(decomposed.linears)
    if budget.multiple == 1:
        return {}
    counted = Counter(budget.ranks.step(linear) for linear in stacked)
    entry: dict[str, Any] = {
        "asked": budget.multiple,
        "linears": {str(step): counted[step] for step in sorted(counted)},
        "predicted_loss": predicted_loss(stacked, curves, plan),
    }
    # losses that an allocator asked for are measured at the multiples alone
    if decomposed.allocator.scoring is Scoring.NONE:
        # a share that is below rank 1 may still have got the smallest multiple
        with suppress(InfeasibleError):
            free = planned(replace(budget, multiple=1))
            entry["predicted_loss_of_every_rank"] = predicted_loss(stacked, curves, free)
    return entry


def predicted_loss(linears: Sequence[Linear], curves: Mapping[str, Any], plan: Plan) -> float:
    """Return the sum of the curves' losses at the ranks of a plan; a dense linear has none."""
    assigned = plan.assignments
    cut = [linear.name for linear in linears if assigned[linear.name].form != "dense"]
    return float(sum(curves[name].loss(assigned[name].rank) for name in cut))


def _curves(decomposed: Decomposed, scores: Scores) -> dict[str, Any]:
    """Curves by linear, those of sensitivities with their losses."""
    read = decomposed.method.kind.curve
    curves = {name: read(result) for name, result in decomposed.results.items()}
    for name, losses in scores.losses.items():
        curves[name] = replace(curves[name], sensitivities=losses)
    return curves
