"""Time of a run in float64, whose rate differs most between GPUs."""

from collections.abc import Mapping

from orchestrator.forecast.costs import Costs
from orchestrator.forecast.rates import MEMORY_TRAFFIC, Machine

MOST = 0.5
"""Least share of a run's time for which products in float64 have a remark."""


def float64_seconds(costs: Costs, machine: Machine, workers: int) -> dict[str, dict[str, float]]:
    """Seconds of a worker in decompositions and pivoting, by kind of work and by row of rates.

    `eigen`: eigendecompositions, also by memory traffic where their rate is not measured;
    `double`: products.
    """
    blocks = costs.finish().times(costs.num_blocks)
    whole = sum(costs.pivots, start=blocks).times(1 / workers)
    eigen = {rates.row: whole.eigen / rates.eigen for rates in machine.rows}
    if machine.modelled_eigen is not None:
        eigen[MEMORY_TRAFFIC] = whole.eigen / machine.modelled_eigen
    double = {rates.row: whole.double / rates.double for rates in machine.rows}
    return {"eigen": eigen, "double": double}


def float64_remark(
    found: Mapping[str, Mapping[str, float]], machine: Machine, seconds: Mapping[str, float]
) -> str:
    """Remark that products in float64 take most of a run, and why; empty if they do not.

    Args:
        found: Result of `float64_seconds`.
        seconds: Sum over calibrate and pivot, by row.
    """
    for rates in machine.rows[:1]:
        share = found["double"][rates.row] / seconds[rates.row]
        if share >= MOST:
            return (
                f"{share:.0%} of calibrate and pivot by {rates.row}: this machine computes float64 "
                f"at 1/{rates.single / rates.double:.0f} of its rate for float32"
            )
    return ""
