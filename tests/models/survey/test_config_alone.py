"""Surveys of models from their configs alone."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from image_text.families import IMAGE_FAMILIES
from moe.families import MOE_FAMILIES

from orchestrator.errors import InputError
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.architecture import Architecture, find_blocks
from orchestrator.models.survey.config_alone import survey_config
from orchestrator.models.survey.repeats import find_repeats

PUBLISHED = Path(__file__).parents[2] / "support/published"
PARAMETERS = {
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-120b": 116_829_156_672,
    "llama-4-scout": 108_641_793_536,
    "llava-1.5-7b": 7_063_427_072,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-30b-a3b": 30_532_122_624,
}
"""Parameters of published models."""
KINDS = {
    "deepseek_v3": (0, 1, 1, 1),
    "gpt_oss": (0, 1, 0, 1),
    "llama4": (0, 1, 0, 3),
    "mixtral": (0, 0, 0, 0),
    "qwen3_next": (0, 1, 0, 1),
}
"""First block built like each of four: dense or experts, window or not, with rotary positions."""


@pytest.mark.parametrize("family", [*FAMILIES, *IMAGE_FAMILIES, *MOE_FAMILIES])
def test_it_says_what_the_survey_of_the_checkpoint_says(family, checkpoint, moe_checkpoint):
    """Names, sites, norms, sizes, experts, dtype and parameters, of every family."""
    directory = (moe_checkpoint if family in MOE_FAMILIES else checkpoint)(family)
    surveyed = LazyModel.open(directory).survey()
    found = survey_config(directory / "config.json")
    assert found == replace(surveyed, fingerprint="")
    buffers = found.sizes.total - found.total_parameters
    assert buffers == (3 * 4 if family == "deepseek_v3" else 0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_parameters(name):
    """And every expert has a name of its own and its part of the tokens."""
    found = survey_config(PUBLISHED / f"{name}.json")
    assert found.total_parameters == PARAMETERS[name]
    routed = [each for each in found.linears if each.routed < 1]
    assert len(routed) == sum(each.count * len(each.parts) for each in found.experts)
    assert len({each.name for each in found.linears}) == len(found.linears)
    if name == "deepseek-v3":
        assert len(routed) == 58 * 256 * 3
        assert {each.routed for each in routed} == {Fraction(8, 256)}


@pytest.mark.parametrize("family", KINDS)
def test_blocks_are_equal_by_what_they_are_built_of(family, moe_checkpoint):
    """Not by their numbers; a block of another kind of attention is another one."""
    architecture = Architecture.read(moe_checkpoint(family))
    model = architecture.build_native(torch.float32, stored=1000)
    _, blocks = find_blocks(model, moe_checkpoint(family))
    assert find_repeats(blocks) == KINDS[family]


def test_a_config_without_a_class_is_refused(tmp_path):
    """Its class says how it is built."""
    config = json.loads((PUBLISHED / "mixtral-8x7b.json").read_bytes())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="architectures is None; one class name is expected"):
        survey_config(tmp_path)
