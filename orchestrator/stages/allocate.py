"""Allocation: curves and the budget to the plan; milliseconds, no tensor."""

from dataclasses import replace
from typing import Any

from orchestrator.allocate.by_bytes import fill_bytes
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

    def divide(keep: float) -> Plan:
        return grouping.spread(
            linears, decomposed.allocator(stacked, curves, keep, cosines, form=decomposed.form)
        )

    share = decomposed.recipe.share
    if decomposed.recipe.keep_bytes is None:
        plan = divide(share)
    else:
        plan = fill_bytes(divide, linears, share, decomposed.codec)
    return extended(decomposed, Planned, plan=plan, curves=curves, scores=scores)


def _curves(decomposed: Decomposed, scores: Scores) -> dict[str, Any]:
    """Curves by linear, those of sensitivities with their losses."""
    read = decomposed.method.kind.curve
    curves = {name: read(result) for name, result in decomposed.results.items()}
    for name, losses in scores.losses.items():
        curves[name] = replace(curves[name], sensitivities=losses)
    return curves
