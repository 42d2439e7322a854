"""The list of stages: the order and the conditions that a run and its forecast share."""

from dataclasses import fields

import pytest

from orchestrator.allocate import ALLOCATORS
from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.gates.learned import Learned
from orchestrator.allocate.sparsity.cap import CapAllocator
from orchestrator.allocate.strs import Strs
from orchestrator.allocate.threshold import Threshold
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import UsageError
from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import machine_of
from orchestrator.forecast.shapes import from_config
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve
from orchestrator.stages import STAGES, option_tables

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "vocab_size": 96,
    "num_attention_heads": 4,
}
RECIPES = [
    ({}, []),
    ({"method": "basis-sharing", "keep": 0.5}, ["refit"]),
    ({"method": "basis-sharing", "keep": 0.8}, []),
    ({"storage": "pivoted"}, ["pivot"]),
    ({"compensate": "input"}, ["walk"]),
    ({"refine": "in_order"}, ["walk"]),
    ({"refine": "blocks"}, ["refine"]),
    ({"method": "cap"}, []),
    ({"allocation": "strs", "storage": "pivoted"}, ["pivot"]),
    ({"refine": "swept", "train": "lean"}, ["refine", "sweep", "train"]),
    (
        {"storage": "pivoted", "compensate": "anchored", "refine": "swept", "train": "all"},
        ["pivot", "walk", "refine", "sweep", "train"],
    ),
]


def recipe_of(given):
    return Recipe(**{"model": "m", "out": "o", "method": "svd-llm", "keep": 0.6} | given)


@pytest.mark.parametrize(("given", "names"), RECIPES)
def test_a_run_and_its_forecast_have_the_same_stages(given, names):
    """Both read them from STAGES: the stages of the recipe, in the order of the list."""
    recipe = recipe_of(given)
    resolved = resolve(recipe)
    assert [stage.name for stage in resolved.stages] == names
    scores = ["score"] if {"cap", "strs"} & {*given.values()} else []
    assert list(resolved.stage_names) == ["calibrate", *scores, *names, "write"]
    resources = Resources(workers=2, machine=machine_of("H100"), memory_bytes=None)
    found = forecast(from_config(CONFIG, "test"), recipe, resources)
    assert [stage.name for stage in found.stages] == [*resolved.stage_names]
    assert list(found.run) == [*resolved.stage_names]


def test_every_stage_is_asked_for_by_a_recipe():
    """The recipes above cover the list."""
    assert {*STAGES} == {name for _, found in RECIPES for name in found}


def test_only_pivoting_keeps_the_errors_of_linears():
    """`verify` compares errors of decompositions unless another stage is in the report."""
    assert [stage.name for stage in STAGES.values() if not stage.changes_errors] == ["pivot"]


@pytest.mark.parametrize("table", sorted(option_tables()))
def test_an_unknown_option_of_a_stage_is_refused(table):
    """It is refused even if the recipe does not ask for the stage."""
    recipe = recipe_of({"options": {table: {"epoch": 3}}})
    with pytest.raises(UsageError, match=f"{table}: unknown option 'epoch'"):
        resolve(recipe)


def test_allocators_declare_the_losses_that_they_need():
    """Six allocators take losses of the model, or learned scores; that is no option of theirs."""
    needed = {name: each.scoring for name, each in ALLOCATORS.items()}
    scoring = {name: each for name, each in needed.items() if each is not Scoring.NONE}
    assert scoring == {
        "strs": Scoring.SENSITIVITIES,
        "cap": Scoring.MASKS,
        "search": Scoring.PLANS,
        "learned": Scoring.GATES,
        "path": Scoring.GATES,
        "soco": Scoring.GATES,
    }
    for each in ALLOCATORS.values():
        assert Allocator in each.__mro__
        assert "scoring" not in {field.name for field in fields(each)}


def test_allocators_tell_what_their_losses_cost():
    """Passes of a sequence through the model: a mask passes all of it, a cut of one linear half."""
    assert CapAllocator(iterations=5, samples=2, chunks=3).scoring_passes(28) == 5 * 2 * 3
    assert Strs(grid="0.2, 0.5 0.7", windows=4).scoring_passes(28) == 3 * 4 * 28 / 2
    assert Threshold().scoring_passes(28) == 0
    assert Learned(steps=500, batch=2).scoring_passes(28) == 3 * 500 * 2


def test_a_uniform_allocation_is_even():
    """Its blocks are all of one size; any other may leave a block whole."""
    assert Uniform().is_even
    assert not Threshold().is_even
