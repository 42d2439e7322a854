"""The machine-readable report of a compression: plain data, the same bytes for the same result.

Everything that may differ between two equal runs (seconds, memory, machines) is under `timings`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.allocate.budget import Budget
from orchestrator.methods.kinds.base import Kind
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.cost import VALUES
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Plan
from orchestrator.version import __version__

FORMAT_VERSION = 1


def make_report(
    *,
    survey: Survey,
    linears: Sequence[Linear],
    plan: Plan,
    budget: Budget,
    kind: Kind[Any],
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
    the inputs (`linalg.ranked.SKETCH`). Where directions are kept in a learned order, the errors of
    those that are not orthogonal (of `two-sided`, and on inputs of `svd` and `asvd`) are estimates;
    with adapters all are, of the directions alone.

    Of an expert `routed` is the part of the tokens that it sees if all see equally many.

    `values` are counted without indices, `bytes` with them, in the dtype that is written.
    `left_out` lists stored tensors that the model's class does not have, if there are any.

    Args:
        budget: The budget of the plan, with the form of the linears that are cut.
        kind: Kind of the results of the method.
        facts: Facts of the decomposition of each linear, and errors that were measured later.
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
        **_sizes(survey, linears, plan, budget, output_dtype=recipe["output_dtype"]),
        "linears": {
            linear.name: _linear(linear, plan, facts[linear.name], kind=kind, budget=budget)
            for linear in linears
        },
        "not_targeted": sorted(
            {linear.name for linear in survey.linears} - {linear.name for linear in linears}
        ),
        **({"left_out": list(survey.unused)} if survey.unused else {}),
        "timings": dict(timings),
    }


def _sizes(
    survey: Survey, linears: Sequence[Linear], plan: Plan, budget: Budget, *, output_dtype: str
) -> dict[str, Any]:
    """Kept fractions, values and bytes of the linears and of the model."""
    codec = CODECS[survey.dtype if output_dtype == "auto" else output_dtype]
    dense_values = sum(linear.values for linear in linears)
    whole = survey.total_parameters - dense_values + plan.stored_values
    return {
        "kept": {
            "asked": budget.kept,
            "asked_of": "bytes" if budget.in_bytes else budget.cost.name,
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
    linear: Linear, plan: Plan, facts: Mapping[str, Any], *, kind: Kind[Any], budget: Budget
) -> dict[str, Any]:
    assigned = plan.assignments[linear.name]
    entry: dict[str, Any] = {
        "form": assigned.form,
        "shape": [linear.out_features, linear.in_features],
        "break_even": budget.form.break_even(linear),
        "values": assigned.stored_values(linear),
        "numerics": facts["numerics"],
    }
    if linear.routed != 1:
        entry["routed"] = float(linear.routed)
    if assigned.form == "dense":
        reason = "its share of the budget holds the whole weight"
        if budget.cost is not VALUES and not budget.ranks.count(linear):
            reason = "no allowed rank costs less than the dense weight"
        return {**entry, "why_dense": reason, "activation_error": 0.0, "weight_error": 0.0}
    if assigned.form == "dropped":
        return {**entry, "activation_error": 1.0, "weight_error": 1.0}
    entry |= {size: getattr(assigned, size) for size in kind.sizes}
    if assigned.basis:
        entry["basis"] = assigned.basis
    return {**entry, **kind.errors(facts, linear, assigned)}
