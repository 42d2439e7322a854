"""Runs whose recipe names no method, no number of sequences or no text."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from pipeline import SENTENCES, add_tokenizer, with_tokenizer

from orchestrator import Recipe, compress
from orchestrator.api import plan
from orchestrator.cli.main import main
from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import resolve

ARCHIVE = Path(__file__).parents[1] / "golden" / "interrupted.tar.xz"
REQUIRED = {"model": "m", "out": "o", "keep": 0.5}


@pytest.fixture(scope="module")
def place(checkpoint, tmp_path_factory):
    """A directory with a model, a text of 180 tokens, and the result of a command of one line."""
    root = tmp_path_factory.mktemp("defaults")
    with_tokenizer(checkpoint("llama"), root / "dense")
    (root / "text.txt").write_text(SENTENCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*COMMAND, "--keep", "50%"]) == 0
    return root


COMMAND = ["compress", "dense", "out", "--calibration", "text.txt", "--executor", "local"]


def report(place, name="out"):
    return json.loads((place / name / "orchestrator_report.json").read_text())


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_the_shortest_command_is_the_fast_preset(place, monkeypatch, capsys):
    """With the preset, and the figures that it found, the command has nothing left to do."""
    monkeypatch.chdir(place)
    recipe = report(place)["recipe"]
    assert (recipe["method"], recipe["storage"]) == ("two-sided", "pivoted")
    given = ["--samples", str(recipe["samples"])]
    given += ["--sequence-length", str(recipe["sequence_length"])]
    assert main([*COMMAND, "--keep", "0.5", "--preset", "fast", *given]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_short_text_gives_what_it_has_with_a_warning(place, monkeypatch, capsys):
    """All but a few of its tokens; the report warns, and says what would suffice. A number of
    sequences that is given and not met is an error."""
    monkeypatch.chdir(place)
    found = report(place)["calibration"]
    there = len(SENTENCES)
    assert there - found["sequences"] < found["tokens_used"] <= there
    # the model has 64 positions
    assert found["sequence_length"] <= 64
    (warning,) = found["warnings"]
    assert f"calibration has {found['tokens_used']} tokens; below " in warning
    assert warning.endswith("give more text")
    command = [*COMMAND, "--keep", "0.5", "--samples", "64"]
    command[2] = "other"
    assert main([*command, "--sequence-length", "64"]) == 4
    assert "give 2 of 64 packed sequences of 64 tokens" in last_line(capsys)


@pytest.mark.parametrize(
    ("given", "method", "storage"),
    [
        ({}, "two-sided", "pivoted"),
        ({"storage": "plain"}, "two-sided", "plain"),
        ({"method": "svd-llm"}, "svd-llm", "plain"),
        ({"method": "two-sided"}, "two-sided", "plain"),
        ({"method": "svd-llm", "storage": "pivoted"}, "svd-llm", "pivoted"),
        ({"preset": "best", "method": "svd-llm"}, "svd-llm", "pivoted"),
        ({"allocation": "mgaa"}, "two-sided", "pivoted"),
    ],
)
def test_a_named_method_is_the_published_one(given, method, storage):
    """The preset is for recipes that name no method: a named one stores plain factors."""
    recipe = resolve(make_recipe(REQUIRED | given)).recipe
    assert (recipe.method, recipe.storage) == (method, storage)


def test_the_default_is_the_preset_for_plan_and_search(place, monkeypatch):
    """A forecast is that of `fast`; a candidate with a named method is the published one."""
    from orchestrator.searching import candidates_of

    monkeypatch.chdir(place)
    given = {"model": "dense", "out": "o", "keep": 0.5}
    assert plan(Recipe(**given)).to_json() == plan(Recipe.preset("fast", **given)).to_json()
    vary = {"method": ["svd-llm", "two-sided"]}
    for candidate in candidates_of(Recipe(**given), vary).values():
        assert resolve(candidate).recipe.storage == "plain"


def test_another_size_keeps_the_default_and_its_sequences(place, tmp_path, monkeypatch, capsys):
    """`retarget` has the method, the storage and the figures of the run."""
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "copy"))
    assert main(["retarget", "out.run", "less", "--keep", "40%", "--executor", "local"]) == 0
    ours, theirs = report(Path())["recipe"], report(Path(), "less")["recipe"]
    assert theirs == {**ours, "keep": 0.4}


def test_a_run_on_the_bundled_text_says_that_own_text_is_better(place, tmp_path, monkeypatch):
    """In the report and as a note; a text that suffices is not called short."""
    monkeypatch.chdir(place)
    notes = []

    def collect(event):
        if event["event"] == "note":
            notes.append(event["text"])

    given = {"model": "dense", "out": str(tmp_path / "out"), "keep": 0.5, "method": "svd"}
    tokens = {"calibration": "bundled", "samples": 4, "sequence_length": 64}
    found = compress(Recipe(**given, **tokens, executor="local"), collect).report["calibration"]
    (warning,) = found["warnings"]
    assert f"warning: {warning}" in notes
    assert "bundled text, small and about Python: text like that" in warning
    assert found["sources"][0]["source"] == "bundled"


def test_the_report_page_and_an_evaluation_take_the_short_text(place, monkeypatch, capsys):
    """The page has the source and the warning; the evaluation has as many tokens as the run."""
    monkeypatch.chdir(place)
    assert main(["report", "out", "--output", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "source text.txt, weight 1, documents 1" in page
    assert "statistics are poor: give more text" in page
    capsys.readouterr()
    assert main(["evaluate", "out", "--text", "text.txt", "--executor", "local", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text["tokens_used"] == report(place)["calibration"]["tokens_used"]


def test_a_run_of_the_earlier_default_is_not_left_unfinished(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """An unfinished run of version 0.1, whose default was svd-llm: the command without a method is
    refused in a line that names both ways on."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ARCHIVE) as archive:
        # `filter` is an argument since Python 3.11.4
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(".")
    add_tokenizer(Path(shutil.copytree(checkpoint("llama"), "llama")))
    Path("text.txt").write_text(SENTENCES)
    before = Path("pivot.run/run.json").read_bytes()
    command = ["compress", "llama", "pivot", "--keep", "0.5", "--calibration", "text.txt"]
    assert main([*command, "--executor", "local"]) == 2
    line = last_line(capsys)
    assert "pivot.run: holds a run of method svd-llm, and this command names none" in line
    assert "add --method svd-llm to resume it, or --preset fast to start anew here" in line
    assert Path("pivot.run/run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("80", "keep is 80; it must be above 0 and at most 1; did you mean 0.8 or 80%?"),
        ("1.5", "it must be above 0 and at most 1"),
        ("150%", "it must be above 0 and at most 1"),
        ("2", "did you mean 0.02 or 2%?"),
        ("800", "keep is 800; it must be above 0 and at most 1"),
    ],
)
def test_a_number_that_is_no_fraction(written, says, capsys):
    """The message names both readings of a number from 2 to 100."""
    assert main(["compress", "m", "o", "--keep", written]) == 2
    assert last_line(capsys).endswith(says)


def test_a_percentage_is_the_same_number():
    """From Python and a recipe file too; other text is refused."""
    for percent in range(1, 101):
        assert make_recipe(REQUIRED | {"keep": f"{percent}%"}).keep == float(f"{percent / 100:.2f}")
    with pytest.raises(UsageError, match="keep is 'a%'; it must be a number"):
        make_recipe(REQUIRED | {"keep": "a%"})


HEAVY = """
import sys
from orchestrator.cli.main import main
code = main(sys.argv[1:])
assert not {"torch", "transformers", "ray", "pyarrow"} & {*sys.modules}
sys.exit(code)
"""


def test_a_missing_text_is_said_before_anything_is_loaded():
    """In one line with all choices."""
    command = [sys.executable, "-c", HEAVY, "compress", "m", "o", "--keep", "0.8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "calibration: no text is named; give --calibration a .txt, " in line
    assert "`bundled`" in line
