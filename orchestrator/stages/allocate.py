"""Allocation: curves and the budget to the plan; milliseconds, no tensor."""

from dataclasses import replace
from typing import Any

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.by_bytes import fill_budget
from orchestrator.plan.plan import Plan
from orchestrator.stages.context.values import Decomposed, Planned, Scores, extended


def allocate(decomposed: Decomposed, scores: Scores) -> Planned:
    """Divide the budget over all linears, unless the scores have decided already.

    Raises:
        UsageError, InfeasibleError: As the allocator.
    """
    if scores.plan is not None:
        return extended(decomposed, Planned, plan=scores.plan, curves={}, scores=scores)
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

    plan = fill_budget(divide, linears, decomposed.budget, decomposed.codec)
    return extended(decomposed, Planned, plan=plan, curves=curves, scores=scores)


def _curves(decomposed: Decomposed, scores: Scores) -> dict[str, Any]:
    """Curves by linear, those of sensitivities with their losses."""
    read = decomposed.method.kind.curve
    curves = {name: read(result) for name, result in decomposed.results.items()}
    for name, losses in scores.losses.items():
        curves[name] = replace(curves[name], sensitivities=losses)
    return curves
