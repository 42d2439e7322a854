"""Whole runs whose ranks are multiples."""

import json

import pytest
from pipeline import run

from orchestrator.cli.main import main
from orchestrator.errors import UsageError
from orchestrator.pages.report import rendered_report
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import resolve

FEW = {"keep": 0.6, "samples": 2, "sequence_length": 16}
REQUIRED = {"model": "m", "out": "o", "keep": 0.5}


@pytest.fixture(scope="module")
def made(llama2, text, tmp_path_factory):
    """The default recipe, of linears [64, 64], [32, 64], [192, 64] and [64, 192]."""
    return run(llama2, tmp_path_factory.mktemp("made") / "out", text, method=None, **FEW)


def ranks(report):
    return {name: entry["rank"] for name, entry in report["linears"].items() if "rank" in entry}


def test_a_preset_has_multiples_within_its_budget(made):
    """A sixteenth of the width: 4, and 2 for k and v; the unused budget is below one step."""
    assert {rank % 4 for rank in ranks(made.report).values()} <= {0, 2}
    for name, rank in ranks(made.report).items():
        assert rank % (2 if ("k_proj" in name or "v_proj" in name) else 4) == 0
    values = made.report["values"]
    assert 0 <= values["slack"] < 4 * (192 + 64)


def test_the_cost_of_multiples_is_in_the_report_and_its_page(made, capsys, text, llama2, tmp_path):
    """The predicted loss of a run with every rank is the one that the report states."""
    said = made.report["rank_multiple"]
    assert (said["asked"], said["linears"]) == ("auto", {"2": 4, "4": 10})
    assert made.report["recipe"]["rank_multiple"] == "auto"
    free = ["retarget", str(made.run_dir), str(tmp_path / "free"), "--rank-multiple", "1"]
    assert main([*free, "--keep", "0.6", "--executor", "local", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert "rank_multiple" not in other
    assert any(rank % 2 for rank in ranks(other).values())
    assert other["values"]["stored"] - made.report["values"]["stored"] < 4 * (192 + 64)
    cost = said["predicted_loss"] / said["predicted_loss_of_every_rank"] - 1
    page = str(rendered_report(made.out))
    assert "multiples of 2 and 4" in page
    assert f"predicted loss {abs(cost):.2%} {'above' if cost >= 0 else 'below'}" in page


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_automatic_multiples_and_methods_every_rank(preset):
    """A number that is given takes precedence; a named method is the published one, with every
    rank; where entries are kept beside ranks, an automatic multiple is 1."""
    made = {"preset": preset, **REQUIRED}
    assert resolve(make_recipe(made)).budget.multiple == "auto"
    assert resolve(make_recipe({**made, "rank_multiple": 8})).budget.multiple == 8
    assert resolve(make_recipe(REQUIRED)).budget.multiple == "auto"
    for method in ("two-sided", "svd-llm", "asvd", "d-rank", "mgaa", "wanda", "cap"):
        assert resolve(make_recipe({**REQUIRED, "method": method})).budget.multiple == 1
    entries = {**REQUIRED, "method": "cap", "rank_multiple": "auto"}
    assert resolve(make_recipe(entries)).budget.multiple == 1


def test_one_is_the_default_of_a_recipe():
    """A preset of every rank is the recipe that it was before multiples, with the same key."""
    assert make_recipe({**REQUIRED, "preset": "fast", "rank_multiple": 1}).rank_multiple is None
    assert make_recipe({**REQUIRED, "method": "svd-llm"}).rank_multiple is None


@pytest.mark.parametrize("multiple", [0, -16, "sixteen", 1.5, True])
def test_other_multiples_are_refused(multiple):
    """A number of 1 or above, or auto."""
    with pytest.raises(UsageError, match="rank_multiple is"):
        make_recipe({**REQUIRED, "rank_multiple": multiple})


def test_entries_have_no_multiples():
    """A number is refused where a cut is no rank alone."""
    for method in ("wanda", "cap", "two-sided-sparse"):
        with pytest.raises(UsageError, match="rank_multiple is 16"):
            resolve(make_recipe({**REQUIRED, "method": method, "rank_multiple": 16}))


def test_measured_losses_are_those_of_multiples(llama2, text, tmp_path):
    """STRS measures its trials at the ranks that it may choose; the loss of other ranks, which it
    has not measured, is not stated."""
    options = {"strs": {"grid": "0.4 0.8", "windows": 1}}
    made = run(
        *(llama2, tmp_path / "out", text),
        **{**FEW, "method": "svd", "allocation": "strs", "options": options, "rank_multiple": 8},
    )
    tried = {int(r) for losses in made.report["strs"]["losses"].values() for r in losses}
    assert tried
    assert not any(rank % 8 for rank in tried | set(ranks(made.report).values()))
    assert "predicted_loss_of_every_rank" not in made.report["rank_multiple"]
