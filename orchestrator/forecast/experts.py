"""Experts in a forecast: their linears, and the fraction of tokens that each of them sees."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.forecast.shapes import TEXT_PARTS, Shapes
from orchestrator.plan.linear import Survey

CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names of the number of experts of a token in configs."""


def with_experts(shapes: Shapes, survey: Survey, config: Mapping[str, Any]) -> Shapes:
    """Return the shapes of a model with experts or a vision tower, with the linears of its survey.

    Headers name them otherwise, or store the experts of a block in one tensor. Other models are
    returned unchanged.

    Args:
        config: The model's config, whose number of experts of a token decides the work.
    """
    if survey.tower:
        shapes = replace(shapes, linears=survey.linears, tower=survey.tower)
    if not survey.experts:
        return shapes
    modules = tuple(each.name for each in survey.experts)
    most = max(survey.experts, key=lambda each: each.count)
    found = replace(shapes, linears=survey.linears, experts=modules)
    values = [each.values for each in found.heaviest if found.is_expert(each.name)]
    chosen = min(_chosen(config) or most.count, most.count)
    return replace(found, expert_values=sum(values), routed=chosen / most.count)


def _chosen(config: Mapping[str, Any]) -> int | None:
    """Number of experts of a token; None if the config does not say it."""
    parts = [part for name in TEXT_PARTS if isinstance(part := config.get(name), dict)]
    found = [part[name] for part in [*parts, config] for name in CHOSEN if name in part]
    return next((number for number in found if type(number) is int and number > 0), None)
