"""Recipes and command lines of random content are accepted or refused with one line."""

from fuzzing import documented, garbled, many, mutated
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import OrchestratorError
from orchestrator.models.checkpoint.output import check_out
from orchestrator.models.survey.locate import locate
from orchestrator.models.survey.select import select
from orchestrator.recipe.recipe import Recipe, make_recipe
from orchestrator.recipe.recipe_file import read_recipe_fields
from orchestrator.recipe.values import parse_option, parse_vary, size_in_bytes
from orchestrator.store.places import parse_place

RECIPE = {
    "model": "dense",
    "out": "small",
    "keep": 0.5,
    "method": "mgaa",
    "samples": 16,
    "target": ["*.mlp.*", "re:.*q_proj"],
    "calibration": "text.txt",
    "max_shard_size": "5GB",
    "preset": "fast",
    "mgaa": {"t": 0.5},
    "options": {"training": {"epochs": 2}},
}


@many(max_examples=350)
@given(values=mutated(RECIPE))
def test_recipes(values):
    """Fields of wrong types and values; an accepted recipe can be written and read again."""
    found = documented(make_recipe, values)
    if isinstance(found, Recipe):
        assert isinstance(found.to_toml().encode(), bytes)
        documented(parse_place, found.out)
        documented(parse_place, found.run_dir or "x")
        documented(check_out, documented(parse_place, "/nowhere"))
        documented(locate, found.model)
        documented(select, ["model.layers.0.mlp.up_proj"], found.target, found.ignore)


TOML = b"""model = "dense"
out = 'small'
keep = 0.5
samples = 0x10
target = ["*.mlp.*", "re:.*q_proj"]
[mgaa]
t = 0.5
[options.training]
epochs = 2
"""


@many(max_examples=200)
@given(content=garbled(TOML))
def test_recipe_files(content, room):
    """Files that are almost TOML."""
    path = room / "recipe.toml"
    path.write_bytes(content)
    found = documented(read_recipe_fields, path)
    if not isinstance(found, OrchestratorError):
        documented(make_recipe, found)


@many(max_examples=250)
@given(text=st.text(max_size=30) | st.text("a.=[]{}\"'0x1e,_9#\n ", max_size=30))
def test_words_of_the_command_line(text):
    """Options, variations, sizes and places."""
    for read in (parse_option, parse_vary, size_in_bytes, parse_place):
        documented(read, text)
