"""Options that nothing in a recipe takes are refused, in one line that says what it has."""

import json

import pytest

from orchestrator.cli.main import main
from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve

FIXED = {"model": "m", "out": "o", "keep": 0.6}


@pytest.mark.parametrize("option", ["mgaa.x=1", "mgaa.t=1"])
def test_an_option_of_another_method(option, tmp_path, capsys):
    """It is refused, existing or not; also by `plan`, which needs a config only."""
    numbers = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    config = {"model_type": "llama", "num_attention_heads": 2} | dict.fromkeys(numbers, 64)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in (["plan", str(tmp_path)], ["compress", str(tmp_path), str(tmp_path / "out")]):
        given = ["--keep", "0.6", "--calibration", "bundled", "--option", option]
        assert main([*command, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"option {option[:6]} has no effect; mgaa has refit, rule, t, " in line
        assert "method two-sided, allocation threshold and stages pivot" in line
        assert "whose options are: two-sided." in line


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"method": "mgaa", "allocation": "uniform"}, {"mgaa": {"t": 1.0}}),
        ({"method": "svd-llm", "allocation": "d-rank"}, {"d-rank": {"group": 2}}),
        ({"compensate": "input"}, {"refinement": {"epochs": 2}}),
        ({"refine": "in_order"}, {"compensation": {"basis": "new"}}),
        ({"refine": "blocks"}, {"training": {"epochs": 2}}),
        ({"preset": "best", "train": "none"}, {"training": {"epochs": 2}}),
    ],
)
def test_a_part_that_the_recipe_does_not_have(fields, options):
    """Half of a table, the table of a stage, or of a stage's other half."""
    preset = fields.get("preset", "fast")
    given = {"storage": "plain", "method": "svd-llm"} | FIXED | fields
    given.pop("preset", None)
    ((table, (option,)),) = options.items()
    with pytest.raises(UsageError, match=f"option {table}.{option} has no effect"):
        resolve(Recipe.preset(preset, options=options, **given))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"allocation": "mgaa"}, {"mgaa": {"t": 1.0}}),
        ({"method": "d-rank"}, {"d-rank": {"group": 2}}),
        ({"compensate": "blend", "refine": "swept"}, {"compensation": {"beta": 0.5}}),
        ({"refine": "swept"}, {"refinement": {"slices": 2}}),
        ({}, {"mgaa": {}}),
    ],
)
def test_a_part_that_the_recipe_has(fields, options):
    """A method used as an allocation, and stages; a table without options is none."""
    recipe = Recipe(**FIXED, **fields, options=options)
    assert resolve(recipe).recipe.options == options


def test_a_preset_gives_no_options_of_stages_that_are_off():
    """`--preset best --train none` is as good as any recipe."""
    recipe = Recipe.preset("best", **FIXED, train="none")
    assert [*recipe.options] == ["refinement"]
    assert [stage.name for stage in resolve(recipe).stages] == ["pivot", "refine"]
