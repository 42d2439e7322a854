"""Forecasts of mixtures of experts: linears of the survey, and the tokens that an expert sees."""

import json

import pytest
from moe.families import EXPERTS

from orchestrator.forecast.experts import with_experts
from orchestrator.forecast.shapes import read_shapes
from orchestrator.forecast.statistics import gathering, method_statistics
from orchestrator.forecast.work import forward_flops
from orchestrator.methods import METHODS
from orchestrator.models.shards.lazy_model import LazyModel


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_linears_are_those_of_the_survey(family, moe_checkpoint):
    """Whatever the names and the layout on disk, so that selectors of `plan` are those of a run."""
    survey = LazyModel.open(moe_checkpoint(family)).survey()
    config = json.loads((moe_checkpoint(family) / "config.json").read_bytes())
    shapes = with_experts(read_shapes(moe_checkpoint(family)), survey, config)
    assert shapes.linears == survey.linears
    assert len(shapes.narrowed(["*.experts.*"], []).linears) >= 3 * 3 * EXPERTS
    block = [each.values for each in survey.of_block(3) if ".experts." in each.name]
    assert (shapes.expert_values, shapes.routed) == (sum(block), 2 / EXPERTS)


def test_work_is_that_of_the_chosen_experts(moe_checkpoint):
    """A token uses two of four experts; an expert's Gram has half of the tokens."""
    survey = LazyModel.open(moe_checkpoint("qwen3_moe")).survey()
    plain = read_shapes(moe_checkpoint("qwen3_moe"))
    shapes = with_experts(plain, survey, {"num_experts_per_tok": 2})
    assert shapes.block_values == plain.block_values
    assert forward_flops(plain, 8) - forward_flops(shapes, 8) == 2 * 8 * shapes.expert_values / 2
    every = with_experts(plain, survey, {})
    assert forward_flops(every, 8) == forward_flops(plain, 8)
    statistics = method_statistics(shapes.heaviest, METHODS["svd"])
    routed, all_tokens = (gathering(each, statistics, 8, 4).flops for each in (shapes, every))
    assert routed < all_tokens


def test_a_model_without_experts_is_unchanged(checkpoint):
    """The same object."""
    survey = LazyModel.open(checkpoint("llama")).survey()
    shapes = read_shapes(checkpoint("llama"))
    assert with_experts(shapes, survey, {}) is shapes
