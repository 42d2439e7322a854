"""Forms of experts in the config: one entry for the linears of a name in all experts."""

import json

import pytest

from orchestrator.errors import InputError
from orchestrator.models.forms.base import StoredForm
from orchestrator.models.forms.config import read_forms, write_forms

MODULE = "model.layers.3.mlp.experts"
UP = [f"{MODULE}.{expert}.up" for expert in range(4)]


def low_rank(*ranks, names=UP):
    pairs = zip(names, ranks, strict=True)
    return {name: StoredForm(form="low_rank", rank=rank) for name, rank in pairs if rank}


def config(experts, **changes):
    fields = {"quant_method": "orchestrator", "format_version": 2, "modules": {}}
    return fields | {"experts": experts} | changes


CASES = {
    "ranks": (low_rank(5, 3, 0, 4), {"form": "low_rank", "rank": [5, 3, 0, 4]}),
    "dense": ({}, None),
    "pivoted and dense": (
        {UP[1]: StoredForm(form="pivoted", rank=2)},
        {"form": "pivoted", "rank": [0, 2, 0, 0]},
    ),
    "entries": (
        {name: StoredForm(form="sparse", nonzeros=7, index="bitmask") for name in UP},
        {"form": "sparse", "nonzeros": [7, 7, 7, 7], "index": "bitmask"},
    ),
    "mixed": (
        low_rank(5, 0, 0, 4)
        | {UP[1]: StoredForm(form="low_rank_sparse", rank=2, nonzeros=6, index="columns")},
        {
            "form": ["low_rank", "low_rank_sparse", "", "low_rank"],
            "rank": [5, 2, 0, 4],
            "nonzeros": [0, 6, 0, 0],
            "index": ["", "columns", "", ""],
        },
    ),
    "one basis": (
        {
            UP[0]: StoredForm(form="low_rank", rank=9),
            UP[2]: StoredForm(form="low_rank", rank=9, basis=UP[0]),
        },
        {"form": "low_rank", "rank": [9, 0, 9, 0], "basis": ["", "", UP[0], ""]},
    ),
    "without numbers": (
        {UP[0]: StoredForm(form="plain")},
        {"form": ["plain", "", "", ""]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_entry_has_the_forms_of_all_experts(case):
    """A value that is the same for all compressed experts is written once."""
    forms, entry = CASES[case]
    written = write_forms(forms, {MODULE: {"up": UP}})
    assert written["format_version"] == 2
    assert written["modules"] == {}
    assert written["experts"] == {MODULE: {} if entry is None else {"up": entry}}


@pytest.mark.parametrize("case", [case for case in CASES if case != "without numbers"])
def test_reading_gives_what_was_written(case):
    """Through JSON; other linears come first."""
    forms, _ = CASES[case]
    forms = {"model.layers.0.self_attn.q_proj": StoredForm(form="low_rank", rank=2), **forms}
    fields = json.loads(json.dumps(write_forms(forms, {MODULE: {"up": UP}})))
    read = read_forms({"quant_method": "orchestrator", **fields})
    assert read == forms
    assert next(iter(read)) == "model.layers.0.self_attn.q_proj"


def test_the_first_format_is_that_of_models_without_compressed_experts():
    """Its fields are those of earlier versions, which can read it."""
    forms = low_rank(5, names=["a"])
    assert write_forms(forms, {}) == {
        "format_version": 1,
        "modules": {"a": {"form": "low_rank", "rank": 5}},
    }


def test_a_model_of_thousands_of_experts_has_a_small_config():
    """18,432 linears with ranks of their own take less than six bytes each."""
    forms, experts = {}, {}
    for block in range(48):
        module = f"model.layers.{block}.mlp.experts"
        experts[module] = {
            part: [f"{module}.{expert}.{part}" for expert in range(128)]
            for part in ("gate", "up", "down")
        }
        for number, name in enumerate(name for part in experts[module].values() for name in part):
            forms[name] = StoredForm(form="low_rank", rank=100 + number)
    assert len(forms) == 18_432
    fields = write_forms(forms, experts)
    assert len(json.dumps(fields)) < 6 * len(forms)
    assert read_forms({"quant_method": "orchestrator", **fields}) == forms


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config([]), r"experts: found \[\], need an object"),
        (config({MODULE: 3}), "found 3, need gate, up, down"),
        (config({MODULE: {"w1": {}}}), "'w1'.*, need gate, up, down"),
        (config({MODULE: {"up": [3]}}), r"up: found \[3\], need form, rank"),
        (config({MODULE: {"up": {"x": [3]}}}), "'x'.*, need form, rank, nonzeros, index, basis"),
        (config({MODULE: {"up": {"form": "low_rank", "rank": 3}}}), "found no list, need lists"),
        (
            config({MODULE: {"up": {"form": ["low_rank"], "rank": [3, 4]}}}),
            "found 1, 2, need lists of one length, an item for each expert",
        ),
        (config({MODULE: {"up": {"rank": [3]}}}), "need a form: low_rank with rank"),
        (
            config({MODULE: {"up": {"form": "low_rank", "rank": [True]}}}),
            "found True, need a whole",
        ),
        (config({MODULE: {"up": {"form": "low_rank", "rank": [[]]}}}), r"found \[\], need a whole"),
        (
            config(
                {MODULE: {"up": {"form": "low_rank", "rank": [3]}}},
                modules={UP[0]: {"form": "low_rank", "rank": 3}},
            ),
            "is in modules and in experts",
        ),
    ],
)
def test_an_invalid_entry_is_refused_in_one_line(given, message):
    """Any content of the field gives an InputError that states what was found."""
    with pytest.raises(InputError, match=message) as caught:
        read_forms(given)
    assert "\n" not in str(caught.value)
