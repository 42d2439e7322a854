"""Shapes of models from configs and headers."""

import pytest
import torch
from families import FAMILIES as TINY
from families import write_model
from forecast_shapes import shapes_of
from large_models import CONFIGS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from orchestrator.forecast.known_architectures import has_known_architecture
from orchestrator.forecast.shapes import FAMILIES, from_config, read_shapes
from orchestrator.models.checkpoint.headers import Headers
from orchestrator.models.shards.lazy_model import LazyModel

PUBLISHED = {
    "Llama-3-8B": 8_030_261_248,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Mistral-7B": 7_241_732_096,
}
"""Parameter counts of checkpoints on the hub."""


@pytest.mark.parametrize("name", CONFIGS)
def test_formulas_have_the_parameters_that_are_published(name):
    """Parameter counts of checkpoints, from the config alone."""
    assert shapes_of(name).total_values == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_formulas_agree_with_transformers(name):
    """Name, shape and bias of every linear, in blocks built without memory."""
    settings = {**CONFIGS[name], "num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    shapes = from_config(settings, name)
    modules = {
        each: module
        for each, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and each != "lm_head"
    }
    assert {each.name for each in shapes.linears} == modules.keys()
    for each in shapes.linears:
        module = modules[each.name]
        assert (each.out_features, each.in_features) == tuple(module.weight.shape)
        assert each.has_bias == (module.bias is not None)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert shapes.block_values == block


@pytest.mark.parametrize("family", sorted(TINY))
def test_headers_say_what_a_survey_says(family, checkpoint):
    """In any family all linears stored as matrices of their own; with formulas, also which of them
    read the same input."""
    directory = checkpoint(family)
    surveyed = LazyModel.open(directory).survey()
    shapes = read_shapes(directory)
    found = {(each.out_features, each.in_features) for each in shapes.linears}
    if shapes.model_type in FAMILIES:
        sites = [(each.name, each.site) for each in surveyed.linears]
        assert [(each.name, each.site) for each in shapes.linears] == sites
        assert shapes.total_values == surveyed.total_parameters
    else:
        turned = {(inputs, outputs) for outputs, inputs in found}
        named = {each.role.rpartition(".")[2] for each in shapes.linears}
        for each in surveyed.of_block(0):
            if each.role.rpartition(".")[2] in named:
                assert (each.out_features, each.in_features) in found | turned
    assert shapes.num_blocks == surveyed.num_blocks
    assert has_known_architecture(Headers.open(directory)) == (shapes.model_type in FAMILIES)


def test_a_vision_tower_is_no_decoder(tmp_path):
    """The blocks are those of the text model, though the tower has more of them."""
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 5}
    tower |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config=tower, image_token_index=90)
    config.mm_tokens_per_image = 4
    write_model(lambda: Gemma3ForConditionalGeneration(config), tmp_path)
    surveyed = LazyModel.open(tmp_path).survey()
    shapes = read_shapes(tmp_path)
    assert shapes.num_blocks == surveyed.num_blocks == 3
    sizes = [
        sorted((x.role, x.out_features, x.in_features) for x in each.linears if x.block == 2)
        for each in (shapes, surveyed)
    ]
    assert sizes[0] == sizes[1]
