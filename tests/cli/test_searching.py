"""Search over settings: the best on held-out text is kept, and no setting is tried twice."""

import pytest
from pipeline import contents, run, write_llama, write_text

from orchestrator import Recipe, search
from orchestrator.cli.main import main
from orchestrator.errors import UsageError
from orchestrator.recipe.values import parse_vary
from orchestrator.searching import candidates_of, settings, with_setting

VARY = {"storage": ["plain", "pivoted"], "threshold.dense": ["hull", "break_even"]}
EVALUATION = {"samples": 2, "sequence_length": 48}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("held-out") / "text.txt"
    path.write_text("The bridge past the inn carried 42 ships; nobody could say when.\n" * 9)
    return path


def recipe(llama, out, text, **fields):
    small = {"keep": 0.5, "samples": 4, "sequence_length": 48, "executor": "local"}
    given = {"model": str(llama), "out": str(out), "calibration": str(text), "method": "two-sided"}
    return Recipe(**(given | small | fields))


def test_the_best_on_held_out_text_is_what_a_direct_run_gives(llama, text, held_out, tmp_path):
    """Every combination is tried once; the one with the lowest perplexity is written, to the
    bit."""
    asked = recipe(llama, tmp_path / "out", text)
    found = search(asked, VARY, text=str(held_out), **EVALUATION)
    assert [tuple(each.setting.values()) for each in found.candidates] == [
        ("plain", "hull"),
        ("plain", "break_even"),
        ("pivoted", "hull"),
        ("pivoted", "break_even"),
    ]
    perplexities = [each.perplexity for each in found.candidates]
    assert found.best.perplexity == min(perplexities) < max(perplexities)
    direct = run(
        llama,
        tmp_path / "direct",
        text,
        method="two-sided",
        samples=4,
        storage=found.best.setting["storage"],
        options={"threshold": {"dense": found.best.setting["threshold.dense"]}},
    )
    assert contents(found.result.out) == contents(direct.out)


def test_a_repeated_search_tries_only_new_candidates(llama, text, held_out, tmp_path):
    """A repeated search computes only new candidates, and no candidate stays on disk."""
    asked = recipe(llama, tmp_path / "out", text)
    short = {"storage": ["plain"]}
    first = search(asked, short, text=str(held_out), **EVALUATION)
    events = []
    longer = {"storage": ["plain", "pivoted"]}
    with pytest.raises(UsageError, match="made from another recipe"):
        # the search has another best, and OUT has the first one
        search(asked, longer, text=str(held_out), on_event=events.append, **EVALUATION)
    headings = [e["text"] for e in events if "combination" in e.get("text", "")]
    assert headings == [
        "combination 1 of 2: storage=plain, evaluated by an earlier search",
        "combination 2 of 2: storage=pivoted",
        "best combination: storage=pivoted",
    ]
    evaluated = [e for e in events if e["event"] == "stage" and e["stage"] == "evaluate"]
    assert [e["state"] for e in evaluated] == ["begin", "end"]
    kept = sorted(path.suffix for path in (tmp_path / "out.search").iterdir())
    assert kept == [".json", ".json"]
    assert first.candidates[0].setting == {"storage": "plain"}


def test_settings_are_every_combination():
    """The values of the last name vary fastest; missing values and names are errors."""
    assert settings({"a": [1, 2], "b": [3]}) == [(("a", 1), ("b", 3)), (("a", 2), ("b", 3))]
    for vary in ({}, {"a": []}):
        with pytest.raises(UsageError, match="vary"):
            settings(vary)


def test_a_setting_is_a_field_or_an_option(llama, text, tmp_path):
    """Fields are replaced, options join their table; fields without effect on bytes are refused."""
    asked = recipe(llama, tmp_path, text, options={"two-sided": {"damping": 0.1}})
    varied = with_setting(asked, {"keep": 0.7, "two-sided.draws": 2})
    assert (varied.keep, varied.options) == (0.7, {"two-sided": {"damping": 0.1, "draws": 2}})
    assert asked.options == {"two-sided": {"damping": 0.1}}
    for name in ("workers", "kep"):
        with pytest.raises(UsageError, match=f"unknown option '{name}'"):
            with_setting(asked, {name: 1})


def test_an_option_is_kept_where_it_has_an_effect(llama, text, tmp_path):
    """Candidates of other methods do without it; one without any effect stays, and is refused."""
    vary = {"method": ["svd-llm", "mgaa"], "mgaa.t": [0.5], "cap.stage2": [False]}
    found = candidates_of(recipe(llama, tmp_path / "out", text), vary)
    nowhere = {"cap": {"stage2": False}}
    assert [each.options for each in found.values()] == [nowhere, {"mgaa": {"t": 0.5}} | nowhere]


def test_values_are_read_as_a_recipe_would():
    """Numbers are numbers, words are words; missing values are refused."""
    assert parse_vary("mgaa.t=0.5,1") == ("mgaa.t", [0.5, 1])
    assert parse_vary("storage=plain, pivoted") == ("storage", ["plain", "pivoted"])
    for wrong in ("storage", "=plain", "storage=plain,,pivoted"):
        with pytest.raises(UsageError, match="vary"):
            parse_vary(wrong)


def test_the_calibration_text_decides_nothing(llama, text, tmp_path):
    """A search on the calibration text is refused before any run."""
    with pytest.raises(UsageError, match="is the calibration text"):
        search(recipe(llama, tmp_path / "out", text), VARY, text=str(text))


def test_the_command_prints_every_candidate(llama, text, held_out, tmp_path, capsys):
    """One line per candidate, the best one marked, then the result as printed by `compress`."""
    words = ["search", llama, tmp_path / "out", "--keep", "0.5", "--method", "two-sided"]
    words += ["--calibration", text, "--samples", "4", "--sequence-length", "48"]
    words += ["--executor", "local", "--text", held_out, "--text-samples", "2"]
    assert main([*map(str, words), "--vary", "storage=plain,pivoted"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["storage=plain" in lines[0], "storage=pivoted" in lines[1]] == [True, True]
    assert sum(line.endswith("  best") for line in lines[:2]) == 1
    assert lines[2].startswith("kept fraction of the targeted linears")
