"""Recipes are checked on construction, and their TOML round trip is exact."""

import tomllib
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import SCHEDULE, Recipe, make_recipe
from orchestrator.recipe.recipe_file import read_recipe_fields
from orchestrator.recipe.values import parse_option, size_in_bytes

REQUIRED = {"model": "dense", "out": "small", "keep": 0.8}
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
names = st.from_regex(r"[a-z][a-z0-9_-]{0,9}", fullmatch=True)
counts = st.integers(min_value=1, max_value=2**63 - 1)


@given(
    st.fixed_dictionaries(
        {
            "model": texts,
            "out": texts,
            "keep": st.floats(min_value=0, max_value=1, exclude_min=True),
            "target": st.lists(texts, min_size=1).map(tuple),
            "ignore": st.lists(texts).map(tuple),
            "download": st.booleans(),
            "options": st.dictionaries(names, st.dictionaries(names, st.booleans() | texts)),
        },
        optional={"calibration": texts, "samples": counts, "workers": counts, "seed": counts},
    )
)
def test_toml_round_trip(values):
    """The written recipe reads back as an equal one, for any strings."""
    recipe = make_recipe(values)
    assert make_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_toml_names_every_field():
    """The written recipe shows every field, unset ones as comments."""
    shown = [line.removeprefix("# ").split(" =")[0] for line in _recipe().to_toml().splitlines()]
    assert shown == [field.name for field in fields(Recipe) if field.name != "options"]


def test_toml_without_schedule_does_not_depend_on_it():
    """Without its schedule the written recipe is the same for any schedule, and reads back."""
    recipe = _recipe(out="elsewhere", workers=4, threads=2, shards=7, address="auto")
    text = recipe.to_toml(schedule=False)
    assert text == _recipe().to_toml(schedule=False)
    assert not set(SCHEDULE) & tomllib.loads(text).keys()
    assert make_recipe({**tomllib.loads(text), "out": "small"}) == _recipe()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("keep", 0, "above 0"),
        ("keep", 1.01, "at most 1"),
        ("keep", float("nan"), "above 0"),
        ("keep", "0.8", "a number"),
        ("keep", True, "a number"),
        ("samples", 0, "1 or above"),
        ("samples", 2.0, "a whole number"),
        ("sequence_length", -1, "1 or above"),
        ("workers", 0, "1 or above"),
        ("threads", True, "a whole number"),
        ("shards", "two", "a whole number"),
        ("seed", -1, "0 or above"),
        ("dtype", "float31", "bfloat16"),
        ("output_dtype", "int8", "bfloat16"),
        ("sampling", "last", "first, random"),
        ("layout", "ragged", "packed, padded"),
        ("executor", "dask", "local, ray"),
        ("max_shard_size", "5 boxes", "5GB"),
        ("download", "yes", "true or false"),
        ("model", "", "empty"),
        ("model", "\udcff", "Unicode"),
        ("target", "*", "a list of strings"),
        ("target", [], "every linear"),
        ("ignore", [1], "a list of strings"),
    ],
)
def test_wrong_value(field, value, says):
    """The message for a wrong value has the field, the value and the allowed values."""
    with pytest.raises(UsageError, match=says) as caught:
        _recipe(**{field: value})
    assert str(caught.value).startswith(f"{field} is ") or field == "max_shard_size"


@pytest.mark.parametrize("given", [{}, {"keep": 0.8, "keep_bytes": 0.8}])
def test_one_budget(given):
    """A recipe without a budget, or with two, is refused; each alone sets the requested
    fraction."""
    paths = {"model": "dense", "out": "small"}
    with pytest.raises(UsageError, match="give one of them"):
        Recipe(**paths, **given)
    assert Recipe(**paths, keep=0.8).requested == Recipe(**paths, keep_bytes=0.8).requested == 0.8


def test_whole_keep():
    """`keep = 1` in TOML is the fraction 1.0."""
    assert isinstance(_recipe(keep=1).keep, float)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("200 mb", 2 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("64KiB", 2**16),
        ("4096", 4096),
        ("1B", 1),
    ],
)
def test_size(text, size):
    """Sizes are decimal, or binary with an i."""
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1XB", "nanGB", "infB", "1 2"])
def test_no_size(text):
    """Text that is not a positive size is refused."""
    with pytest.raises(UsageError, match="write it like"):
        size_in_bytes(text)


def test_unknown_field(tmp_path):
    """The message for an unknown field has near misses, from Python and from a file."""
    with pytest.raises(UsageError, match="near misses: samples, sampling"):
        make_recipe({**REQUIRED, "sample": 8})
    path = tmp_path / "recipe.toml"
    path.write_text("kep = 0.8\n")
    with pytest.raises(UsageError, match=r"recipe\.toml: unknown field 'kep'; near misses: keep"):
        read_recipe_fields(path)


@pytest.mark.parametrize(
    "content",
    [
        "[compress]\nkeep = 0.5\nsamples = 4\n",
        "[recipe]\nsamples = 4\n",
        '[everything]\nmodel = "dense"\n',
    ],
)
def test_fields_in_a_table_are_refused(content, tmp_path):
    """Only options are in tables; an option may have the name of a field, `cap.samples`."""
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"fields are in a table .*; write them at the top"):
        read_recipe_fields(path)
    path.write_text("[cap]\nsamples = 4\n")
    assert read_recipe_fields(path) == {"cap": {"samples": 4}}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("*.q_proj,*.k_proj", ("*.q_proj", "*.k_proj")),
        ("a, b,", ("a", "b")),
        ("*.[q,k]_proj,c", ("*.[q,k]_proj", "c")),
        ("re:.{1,2}_proj,b", ("re:.{1,2}_proj,b",)),
        ("a,re:.{1,2}", ("a", "re:.{1,2}")),
        ("", ("",)),
    ],
)
def test_commas_separate_selectors(given, found):
    """Several selectors in one value are those of a repeated flag; a comma of a regular expression
    is a part of it."""
    recipe = Recipe(model="m", out="o", keep=0.5, target=(given,), ignore=("z", given))
    assert (recipe.target, recipe.ignore) == (found, ("z", *found))


def test_missing_fields():
    """The message names all missing required fields."""
    with pytest.raises(UsageError, match="out missing"):
        make_recipe({"model": "dense"})


@pytest.mark.parametrize("content", [b"keep = ", b"\xff", None])
def test_unreadable_file(tmp_path, content):
    """The message for a missing or invalid recipe file has its path."""
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        read_recipe_fields(path)


def test_names_are_checked_against_what_there_is():
    """The message for an unknown method or allocation lists the existing ones."""
    recipe = _recipe(method="svd")
    with pytest.raises(UsageError, match="method is 'svd'; it must be one of asvd, svd-llm"):
        recipe.check_names(methods={"svd-llm": 1, "asvd": 2}, allocations={"uniform": 1})
    with pytest.raises(UsageError, match="allocation is 'uniform'"):
        _recipe(allocation="uniform").check_names(methods=["svd-llm"], allocations=["greedy"])
    allowed = "compensation, mgaa, refinement, svd-llm, training"
    with pytest.raises(UsageError, match=f"options is 'mgga'; it must be one of {allowed}"):
        _recipe(options={"mgga": {}}).check_names(
            methods=["svd-llm"],
            allocations=["mgaa"],
            tables=["training", "compensation", "refinement"],
        )


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("mgaa.t=0.5", ("mgaa", "t", 0.5)),
        ("mgaa.rule=power", ("mgaa", "rule", "power")),
        ('d-rank.scope="type"', ("d-rank", "scope", "type")),
        ("a.b=true", ("a", "b", True)),
    ],
)
def test_an_option_is_a_toml_value_or_a_string(text, parsed):
    """Numbers, booleans and quoted strings as in TOML, bare words as strings."""
    assert parse_option(text) == parsed


@pytest.mark.parametrize("text", ["mgaa", "mgaa.t", "t=1", ".t=1", "mgaa.=1", "mgaa.a b=1"])
def test_an_option_without_name_or_value_is_refused(text):
    """The message shows the expected form."""
    with pytest.raises(UsageError, match=r"mgaa\.t=0\.5"):
        parse_option(text)


@pytest.mark.parametrize("options", [{"mgaa": 1}, {"mgaa": {"t": []}}, {"mgaa": {"a b": 1}}, 3])
def test_options_are_tables_of_plain_values(options):
    """Other values could not be written back."""
    with pytest.raises(UsageError, match="options"):
        _recipe(options=options)


def _recipe(**changes):
    return Recipe(**{**REQUIRED, **changes})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_the_fields_that_nothing_else_gives(preset, tmp_path):
    """From the command line, a file and Python the recipe is the same, with all fields written."""
    fixed = {"model": "m", "out": "o", "keep": 0.8}
    recipe = Recipe.preset(preset, **fixed)
    assert make_recipe({**fixed, "preset": preset}) == recipe
    file = tmp_path / "recipe.toml"
    file.write_text(f'preset = "{preset}"\nmodel = "m"\nout = "o"\nkeep = 0.8\n')
    assert make_recipe(read_recipe_fields(file)) == recipe
    assert make_recipe(tomllib.loads(recipe.to_toml())) == recipe
    assert make_recipe({**fixed, "preset": preset, "method": "svd"}).method == "svd"
    assert all(getattr(recipe, name) == value for name, value in PRESETS[preset].items())


def test_options_stand_over_those_of_a_preset_one_by_one():
    """Given options replace those of a preset one by one; a value that is not a table is
    refused."""
    fixed = {"model": "m", "out": "o", "keep": 0.8}
    options = {"training": {"epochs": 2}, "two-sided": {"draws": 2}}
    expected = {name: dict(table) for name, table in PRESETS["best"]["options"].items()}
    expected["training"]["epochs"] = 2
    expected["two-sided"] = {"draws": 2}
    recipe = Recipe.preset("best", options=options, **fixed)
    assert recipe.options == expected
    assert make_recipe({**fixed, "preset": "best", **options}) == recipe
    assert Recipe.preset("best", **fixed).options == PRESETS["best"]["options"]
    with pytest.raises(UsageError, match="must be a table"):
        Recipe.preset("best", options={"training": 3}, **fixed)


def test_a_preset_that_does_not_exist_is_refused():
    """The message lists the existing presets."""
    fixed = {"model": "m", "out": "o", "keep": 0.8}
    with pytest.raises(UsageError, match=r"preset is .faster.; it must be one of .*fast"):
        make_recipe({**fixed, "preset": "faster"})
    with pytest.raises(UsageError, match="preset"):
        Recipe.preset("faster", **fixed)
