"""Allocation: curves and the budget to the plan; milliseconds, no tensor."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from orchestrator.allocate.base import Scoring
from orchestrator.allocate.budget import Budget, plan_cost
from orchestrator.allocate.experts.drops import predicted_loss
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.gates.scores import extrapolates
from orchestrator.errors import InfeasibleError
from orchestrator.plan.cost import CACHE, OPERATIONS, PICOSECONDS, VALUES, Cost, TimeCost
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.stages.context.values import (
    Decomposed,
    Dividing,
    Planned,
    Scores,
    extended,
)


def allocate(decomposed: Decomposed, scores: Scores) -> Planned:
    """Divide the budget over all linears, unless the scores have decided already.

    Raises:
        UsageError, InfeasibleError: As the allocator.
    """
    if scores.plan is not None and decomposed.allocator.scoring is Scoring.MASKS:
        facts: dict[str, Any] = {"multiples": {}, "costs": _costs(decomposed, scores.plan, {})}
        return extended(decomposed, Planned, plan=scores.plan, curves={}, scores=scores, **facts)
    linears, curves, cosines, _ = dividing(decomposed, scores)

    def planned(budget: Budget) -> Plan:
        allocator = decomposed.allocator
        return _filled(
            decomposed,
            lambda part: allocator(linears, curves, part, cosines),
            budget,
            divides_costs=allocator.divides_costs,
        )

    plan = scores.plan or planned(decomposed.budget)
    about = dict(decomposed.allocator.facts(decomposed.linears, cosines, plan))
    if scores.learned:
        extrapolated = extrapolates(linears, curves, plan, decomposed.budget.ranks)
        about["learn"] = {**scores.report["learn"], "extrapolated": extrapolated}
    scores = replace(scores, report={**scores.report, **about})
    facts = {
        "multiples": _multiples(decomposed, plan, planned, curves),
        "costs": _costs(decomposed, plan, curves),
    }
    return extended(decomposed, Planned, plan=plan, curves=curves, scores=scores, **facts)


def dividing(decomposed: Decomposed, scores: Scores) -> Dividing:
    """Return what an allocator is given beside the budget, joint linears of groups among it."""
    cosines = {
        sublayer: cosine["mean"]
        for facts in decomposed.facts.values()
        for sublayer, cosine in facts["cosines"].items()
    }
    return Dividing(
        linears=decomposed.grouping.stacked(decomposed.linears),
        curves=_curves(decomposed, scores),
        cosines=cosines,
        filled=lambda divide: _filled(decomposed, divide, decomposed.budget),
    )


def _filled(
    decomposed: Decomposed,
    divide: Callable[[Budget], Plan],
    budget: Budget,
    *,
    divides_costs: bool = False,
) -> Plan:
    """Return the plan of all linears that fills a budget, by a function that plans joint ones."""
    grouping, linears = decomposed.grouping, decomposed.linears
    return fill_budget(
        lambda part: grouping.spread(linears, divide(part)),
        linears,
        budget,
        decomposed.codec,
        # shares of a group are those of its joint linear, whose basis each member multiplies by
        divides_costs=divides_costs and not grouping.is_shared,
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
    is_timed = isinstance(budget.cost, TimeCost)  # of multiples alone
    if decomposed.allocator.scoring is Scoring.NONE and not is_timed:
        # a share that is below rank 1 may still have got the smallest multiple
        with suppress(InfeasibleError):
            free = planned(replace(budget, multiple=1))
            entry["predicted_loss_of_every_rank"] = predicted_loss(stacked, curves, free)
    return entry


def _costs(decomposed: Decomposed, plan: Plan, curves: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about operations, time, cache and loss of a plan that is limited by one of them, or
    whose times are known; empty otherwise."""
    budget, linears, table = decomposed.budget, decomposed.linears, decomposed.latency_table
    if budget.cost is VALUES and table is None:
        return {}
    entry: dict[str, Any] = {
        "limited": budget.cost.name,
        "dense_linears": sum(each.form == "dense" for each in plan.assignments.values()),
        "operations": _spent(OPERATIONS, linears, plan),
    }
    if budget.cost is CACHE:
        entry["cache"] = _spent(CACHE, linears, plan)
    if table is not None:
        time = TimeCost(table)
        spent = _spent(time, linears, plan)
        about = {name: getattr(table, name) for name in ("file", "device", "dtype", "threads")}
        micro = {name: 1e6 * spent[name] / PICOSECONDS for name in spent}
        entry["microseconds"] = {**micro, "tokens": table.tokens, **about}
    if curves and budget.form.is_factored:
        stacked = decomposed.grouping.stacked(linears)
        entry["predicted_loss"] = predicted_loss(stacked, curves, plan)
    if budget.cost is not VALUES:
        entry["budget"] = budget.cost.shown(budget.share(linears))
    return entry


def _spent(cost: Cost, linears: Sequence[Linear], plan: Plan) -> dict[str, int]:
    dense = sum(map(cost.dense, linears))
    return {"dense": dense, "planned": plan_cost(linears, plan.assignments, cost)}


def _curves(decomposed: Decomposed, scores: Scores) -> dict[str, Any]:
    """Curves by linear, with sensitivities or learned scores and their order if there are some."""
    read = decomposed.method.kind.curve
    curves = {name: read(result) for name, result in decomposed.results.items()}
    for name, losses in scores.losses.items():
        curves[name] = replace(curves[name], sensitivities=losses)
    for name, learned in scores.learned.items():
        energies = learned.arrange(curves[name].energies)
        curves[name] = replace(curves[name], energies=energies, scores=learned.scores)
    return curves
