"""Forecasts of mixtures of experts: linears of the survey, and the tokens that an expert sees."""

from dataclasses import replace

import pytest
from moe.families import BLOCKS, EXPERTS, MOE_FAMILIES

from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import machine_of
from orchestrator.forecast.statistics import gathering, method_statistics
from orchestrator.forecast.surveyed import surveyed_shapes
from orchestrator.forecast.work import DRIFT_FLOPS, forward_flops
from orchestrator.methods import METHODS
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.recipe.recipe import make_recipe
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


def test_a_pass_of_a_walk_serves_the_sites_of_many_experts(moe_checkpoint):
    """Compensation passes the chunks once for q, k and v, once for o, once for all gates and ups,
    and once for all downs, each half of a block in both models; moments are of the tokens seen."""
    shapes = surveyed_shapes(LazyModel.open(moe_checkpoint("mixtral")).survey())
    fields = {"method": "svd-llm", "keep": 0.8, "compensate": "input", "dtype": "float32"}
    asked = make_recipe({"model": "m", "out": "o", "samples": 5, "sequence_length": 8} | fields)
    found = forecast(
        shapes, asked, Resources(workers=1, machine=machine_of("H100"), memory_bytes=None)
    )
    (walk,) = [each for each in found.stages if each.name == "walk"]
    passed = forward_flops(shapes, 8)
    moments = DRIFT_FLOPS * 8 * (2 * 32**2 + EXPERTS * (32**2 + 48**2) * 2 / EXPERTS)
    sites = [*(each.in_features for each in shapes.heaviest if each.name == each.site)]
    fits = sum(6 * each.values * each.in_features for each in shapes.heaviest)
    solved = 4 * sum(n**3 for n in sites) + fits
    by_hand = BLOCKS * (5 * (3 * passed + 2 * passed * 4 / 2 + moments) + solved)
    assert walk.flops == pytest.approx(by_hand)
