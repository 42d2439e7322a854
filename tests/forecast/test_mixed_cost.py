"""Forecast of a mixed training: the second weights, and their products."""

from functools import partial

import pytest
from forecast_shapes import recipe, shapes_of

from orchestrator.api import plan

NAME = "Llama-3-8B"


def test_mixed_weights_take_their_bytes_and_half_of_the_mixed_products(config):
    """Blocks of the dense model in its dtype; FLOPs are between those of the compressed and of the
    dense model, linear in the fraction of mixed steps; nothing changes if it is 0."""
    path, shapes = config(NAME, dtype="bfloat16", tie_word_embeddings=False), shapes_of(NAME)
    stages = {}
    for mixed in (0.0, 0.5, 1.0):
        options = {"training": {"mixed": mixed}}
        given = {"model": path, "method": "lpaf", "train": "all", "keep": 0.5, "options": options}
        found = plan(recipe(**given), gpus=4)
        (stages[mixed],) = [each for each in found.stages if each.name == "train"]
    none, half, whole = (partial(getattr, each) for each in stages.values())
    assert "decomposed weights" not in none("device").parts
    size = shapes.num_blocks // 4 * shapes.block_values * 2
    assert half("device").parts["decomposed weights"] == size
    assert half("device").parts == whole("device").parts
    added = [each("flops") - none("flops") for each in (half, whole)]
    assert added[1] == pytest.approx(2 * added[0])
    # half the linears of all steps are dense, which halves what keep 0.5 saves
    assert 1 < whole("flops") / none("flops") < 1.5
