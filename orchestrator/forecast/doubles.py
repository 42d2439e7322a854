"""Time of a run in float64, whose rate differs most between GPUs."""

from collections.abc import Mapping, Sequence

from orchestrator.forecast.costs import Costs
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.rates import MEMORY_TRAFFIC, Machine
from orchestrator.forecast.work import Work

MOST = 0.5
"""Least share of a run's time for which products in float64 have a remark."""


def float64_seconds(
    costs: Costs, calls: Sequence[Work], machine: Machine, workers: int
) -> dict[str, dict[str, float]]:
    """Seconds of a worker in decompositions and other calls, by kind of work and by row of rates.

    `eigen`: eigendecompositions, also by memory traffic where their rate is not measured;
    `double`: products.

    Args:
        calls: Calls of stages that are mostly in float64 (`StageCost.is_float64`).
    """
    blocks = costs.finish().times(costs.num_blocks)
    whole = sum(calls, start=blocks).times(1 / workers)
    eigen = {rates.row: whole.eigen / rates.eigen for rates in machine.rows}
    if machine.modelled_eigen is not None:
        eigen[MEMORY_TRAFFIC] = whole.eigen / machine.modelled_eigen
    double = {rates.row: whole.double / rates.double for rates in machine.rows}
    return {"eigen": eigen, "double": double}


def float64_remark(
    found: Mapping[str, Mapping[str, float]],
    machine: Machine,
    stages: Sequence[StageForecast],
) -> str:
    """Remark that products in float64 take most of a run, and why; empty if they do not.

    Args:
        found: Result of `float64_seconds`.
        stages: The stages with this work.
    """
    names = " and ".join(each.name for each in stages)
    for rates in machine.rows[:1]:
        share = found["double"][rates.row] / sum(each.seconds[rates.row] for each in stages)
        if share >= MOST:
            row = rates.row.replace("_", " ")
            return (
                f"{share:.0%} of {names} by {row}: this machine computes float64 "
                f"at 1/{rates.single / rates.double:.0f} of its rate for float32"
            )
    return ""
