"""Shapes of a surveyed model: of any family, with its experts and the tokens that each sees."""

from dataclasses import replace

from orchestrator.forecast.shapes import Shapes
from orchestrator.plan.codecs import itemsize_of
from orchestrator.plan.linear import Survey


def surveyed_shapes(survey: Survey) -> Shapes:
    """The shapes of a model with names, sites and sizes of its survey.

    Headers name linears otherwise, or store the experts of a block in one tensor.
    """
    sizes, linears = survey.sizes, survey.linears
    heads = [each.in_features for each in linears if each.role.endswith("o_proj")]
    found = Shapes(
        model_type=survey.model_type,
        num_blocks=survey.num_blocks,
        linears=linears,
        block_values=sizes.block,
        front_values=sizes.front,
        tail_values=sizes.tail,
        total_values=sizes.total,
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        attention=max(heads, default=sizes.hidden),
        itemsize=itemsize_of(survey.dtype, 4),
        modules=survey.experts,
        tower=survey.tower,
    )
    if not survey.experts:
        return found
    most = max(survey.experts, key=lambda each: each.count)
    values = sum(each.values for each in found.heaviest if found.is_expert(each.name))
    return replace(found, expert_values=values, routed=most.chosen / most.count)
