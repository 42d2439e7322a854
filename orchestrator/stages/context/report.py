"""The machine-readable report of a compression: plain data, the same bytes for the same result.

Everything that may differ between two equal runs (seconds, memory, machines) is in `timings` and
nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.plan.codecs import CODECS
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Plan
from orchestrator.version import __version__

FORMAT_VERSION = 1


def make_report(
    *,
    survey: Survey,
    linears: Sequence[Linear],
    plan: Plan,
    form: Form,
    curves: Mapping[str, Curve],
    facts: Mapping[str, Mapping[str, Any]],
    tokens: Mapping[str, Any],
    recipe: Mapping[str, Any],
    key: str,
    timings: Mapping[str, Any],
) -> dict[str, Any]:
    """Report of the request, and of the form and errors of every linear.

    For each linear `activation_error` is Σ|Wx − W'x|² / Σ|Wx|² over the calibration tokens, and
    `weight_error` is |W − W'|² / |W|² in the Frobenius norm, both from the decomposition; those of
    sparse weights are interpolated between every 5 % of the density, those of `two-sided-sparse`
    between its measured points, and of `cap` the first is an estimate from random combinations of
    the inputs (`linalg.ranked.SKETCH`).

    `values` are counted without indices, `bytes` with them, in the dtype that is written.

    Args:
        form: Form of the linears that are cut.
        curves: For each linear; none of those whose parts are chosen one by one.
        facts: For each linear the facts of its decomposition.
        key: Key of the result: hash of everything that decides its bytes.
    """
    return {
        "format_version": FORMAT_VERSION,
        "producer": f"orchestrator {__version__}",
        "key": key,
        "base_fingerprint": survey.fingerprint,
        "architecture": survey.architecture,
        "recipe": dict(recipe),
        "calibration": dict(tokens),
        **_sizes(survey, linears, plan, recipe),
        "linears": {
            linear.name: _linear(
                linear, plan, curves.get(linear.name), facts[linear.name], form=form
            )
            for linear in linears
        },
        "not_targeted": sorted(
            {linear.name for linear in survey.linears} - {linear.name for linear in linears}
        ),
        "timings": dict(timings),
    }


def _sizes(
    survey: Survey, linears: Sequence[Linear], plan: Plan, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Kept fractions, values and bytes of the linears and of the model."""
    asked = recipe["output_dtype"]
    codec = CODECS[survey.dtype if asked == "auto" else asked]
    dense_values = sum(linear.values for linear in linears)
    whole = survey.total_parameters - dense_values + plan.stored_values
    by_values = recipe["keep_bytes"] is None
    return {
        "kept": {
            "asked": recipe["keep"] if by_values else recipe["keep_bytes"],
            "asked_of": "values" if by_values else "bytes",
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
        "bytes": {
            "dense_linears": codec.bytes(dense_values),
            "stored": sum(
                plan.assignments[linear.name].stored_bytes(linear, codec) for linear in linears
            ),
        },
    }


def _linear(
    linear: Linear, plan: Plan, curve: Curve | None, facts: Mapping[str, Any], *, form: Form
) -> dict[str, Any]:
    assignment = plan.assignments[linear.name]
    entry: dict[str, Any] = {
        "form": assignment.form,
        "shape": [linear.out_features, linear.in_features],
        "break_even": form.break_even(linear),
        "values": assignment.stored_values(linear),
        "numerics": facts["numerics"],
    }
    if assignment.form == "dense":
        reason = "its share of the budget holds the whole weight"
        return {**entry, "why_dense": reason, "activation_error": 0.0, "weight_error": 0.0}
    if assignment.form == "low_rank_sparse" or curve is None:
        # what is left of two parts that overlap follows from no curve
        entry |= {"rank": assignment.rank, "nonzeros": assignment.nonzeros}
        errors = ("activation_error", "weight_error")
        return {**entry, **{name: facts.get(name) for name in errors}}
    if assignment.form == "sparse":
        entry["nonzeros"] = assignment.nonzeros
        activation_error, weight_error = _sparse_errors(linear, assignment.nonzeros, facts)
    else:
        entry["rank"] = assignment.rank
        if assignment.basis:
            entry["basis"] = assignment.basis
        activation_error, weight_error = _low_rank_errors(curve, assignment.rank, facts)
    return {**entry, "activation_error": activation_error, "weight_error": weight_error}


def _low_rank_errors(curve: Curve, rank: int, facts: Mapping[str, Any]) -> tuple[float, float]:
    """Fractions of the energies of outputs and weight that this rank loses.

    The method's own curve is of the outputs unless the facts have a separate one.
    """
    energies = facts.get("activation_energies", curve.energies)
    activation_error = _tail(energies, rank, facts.get("activation_total", curve.total))
    weight_error = _tail(facts["weight_energies"], rank, facts["weight_total"])
    return activation_error, weight_error


def _tail(energies: Sequence[float], kept: int, total: float) -> float:
    """The fraction of a total that the first energies do not hold."""
    return max(1.0 - float(np.sum(energies[:kept])) / total, 0.0) if total else 0.0


def _sparse_errors(linear: Linear, nonzeros: int, facts: Mapping[str, Any]) -> tuple[float, float]:
    """The same fractions for kept entries, interpolated between measured densities."""
    errors = []
    for losses in (facts["activation_losses"], facts["weight_losses"]):
        kept = np.linspace(0, linear.values, len(losses))
        # a norm falls more evenly than its square
        lost = float(np.interp(nonzeros, kept, np.sqrt(losses))) ** 2
        errors.append(lost / losses[0] if losses[0] else 0.0)
    activation_error, weight_error = errors
    return activation_error, weight_error
