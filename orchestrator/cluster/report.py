"""The machine-readable report of a compression: plain data, the same bytes for the same result.

Everything that may differ between two equal runs (seconds, memory, machines) stands under
`timings` and nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import orchestrator
from orchestrator.plan import Curve, Linear, Plan, Survey

FORMAT_VERSION = 1


def make_report(
    *,
    survey: Survey,
    linears: Sequence[Linear],
    plan: Plan,
    curves: Mapping[str, Curve],
    facts: Mapping[str, Mapping[str, Any]],
    tokens: Mapping[str, Any],
    recipe: Mapping[str, Any],
    key: str,
    timings: Mapping[str, Any],
) -> dict[str, Any]:
    """What was asked, what became of every linear, and what it lost.

    For each linear `activation_error` is Σ|Wx − W'x|² / Σ|Wx|² over the calibration tokens, and
    `weight_error` is |W − W'|² / |W|² in the Frobenius norm, both from the decomposition.

    Args:
        facts: For each linear the facts of its decomposition.
        key: The name of the result: hash of all that decides its bytes.
    """
    dense_values = sum(linear.values for linear in linears)
    whole = survey.total_parameters - dense_values + plan.stored_values
    return {
        "format_version": FORMAT_VERSION,
        "producer": f"orchestrator {orchestrator.__version__}",
        "key": key,
        "base_fingerprint": survey.fingerprint,
        "architecture": survey.architecture,
        "recipe": dict(recipe),
        "calibration": dict(tokens),
        "kept": {
            "asked": recipe["keep"],
            "linears": plan.stored_values / dense_values,
            "model": whole / survey.total_parameters,
        },
        "values": {
            "dense_linears": dense_values,
            "budget": plan.budget_values,
            "stored": plan.stored_values,
            "slack": plan.slack_values,
            "model_before": survey.total_parameters,
            "model_after": whole,
        },
        "linears": {
            linear.name: _linear(linear, plan, curves[linear.name], facts[linear.name])
            for linear in linears
        },
        "not_targeted": sorted(
            {linear.name for linear in survey.linears} - {linear.name for linear in linears}
        ),
        "timings": dict(timings),
    }


def _linear(linear: Linear, plan: Plan, curve: Curve, facts: Mapping[str, Any]) -> dict[str, Any]:
    assignment = plan.assignments[linear.name]
    entry: dict[str, Any] = {
        "form": assignment.form,
        "shape": [linear.out_features, linear.in_features],
        "break_even": linear.break_even,
        "values": assignment.stored_values(linear),
        "numerics": facts["numerics"],
    }
    if assignment.form == "dense":
        reason = "its rank is not below break-even"
        return {**entry, "why_dense": reason, "activation_error": 0.0, "weight_error": 0.0}
    kept = float(np.sum(facts["weight_energies"][: assignment.rank]))
    return {
        **entry,
        "rank": assignment.rank,
        "activation_error": curve.loss(assignment.rank) / curve.total if curve.total else 0.0,
        "weight_error": max(1.0 - kept / facts["weight_total"], 0.0)
        if facts["weight_total"]
        else 0.0,
    }
