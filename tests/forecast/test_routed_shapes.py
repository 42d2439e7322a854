"""Forecasts of mixtures of experts: linears of the survey, and the tokens that an expert sees."""

from dataclasses import replace

import pytest
from moe.families import EXPERTS, MOE_FAMILIES

from orchestrator.forecast.statistics import gathering, method_statistics
from orchestrator.forecast.surveyed import surveyed_shapes
from orchestrator.forecast.work import forward_flops
from orchestrator.methods import METHODS
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.stages.plannable import plannable_shapes


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4", "llava", "qwen2_5_vl"])
def test_a_config_is_enough(family, checkpoint, moe_checkpoint):
    """The shapes are those that the survey of the checkpoint gives."""
    directory = (moe_checkpoint if family in MOE_FAMILIES else checkpoint)(family)
    survey = LazyModel.open(directory).survey()
    shapes = plannable_shapes(directory / "config.json")
    assert shapes == surveyed_shapes(survey)
    assert shapes.linears == survey.linears
    assert (shapes.vocabulary, shapes.hidden) == (96, 32)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_are_those_of_the_survey(family, moe_checkpoint):
    """Whatever the names and the layout on disk, so that selectors of `plan` are those of a run."""
    survey = LazyModel.open(moe_checkpoint(family)).survey()
    shapes = surveyed_shapes(survey)
    assert len(shapes.narrowed(["*.experts.*"], []).linears) >= 3 * 3 * EXPERTS
    block = [each.values for each in survey.of_block(3) if ".experts." in each.name]
    assert (shapes.expert_values, shapes.routed) == (sum(block), 2 / EXPERTS)


def test_work_is_that_of_the_chosen_experts(moe_checkpoint):
    """A token uses two of four experts; an expert's Gram has half of the tokens."""
    shapes = surveyed_shapes(LazyModel.open(moe_checkpoint("qwen3_moe")).survey())
    every = replace(shapes, routed=1.0)
    assert forward_flops(every, 8) - forward_flops(shapes, 8) == 2 * 8 * shapes.expert_values / 2
    statistics = method_statistics(shapes.heaviest, METHODS["svd"])
    routed, all_tokens = (gathering(each, statistics, 8, 4).flops for each in (shapes, every))
    assert routed < all_tokens
