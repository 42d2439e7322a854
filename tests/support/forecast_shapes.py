"""Shapes of published models, and recipes for them."""

from large_models import CONFIGS

from orchestrator.forecast.shapes import from_config
from orchestrator.recipe.recipe import make_recipe


def shapes_of(name):
    settings = {"dtype": "bfloat16", "tie_word_embeddings": False}
    return from_config(CONFIGS[name] | settings, name)


def recipe(**fields):
    method = {} if "preset" in fields else {"method": "svd-llm"}
    return make_recipe({"model": "m", "out": "o", "keep": 0.8} | method | fields)
