"""Tasks of lm-evaluation-harness, from local files: accuracies, retention, errors and reports."""

import json
import math
import sys

import pytest
from benchmarks.zero_shot import arc_easy

from orchestrator import api, load
from orchestrator.cli.main import main
from orchestrator.cli.results import retention_text
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.pages.sources import read_source
from orchestrator.plan.result import REPORT_FILE, bits_per_weight
from orchestrator.stages.evaluate.tasks import compared

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")


def evaluate(place, capsys, *flags, tasks="ships,guessed"):
    """Exit code, stdout and the last line of stderr of an evaluation in this process."""
    words = ["evaluate", place / "out", "--against", place / "dense", "--tasks", tasks]
    words += ["--task-dir", place / "tasks", "--dtype", "float32", "--executor", "local", *flags]
    code = main([*map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err.strip().splitlines()[-1]


def test_accuracy_agrees_with_independent_log_likelihoods(place, report):
    """Dense and compressed accuracies equal those of the benchmark, which has its own code."""
    lines = (place / "tasks" / "documents.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    row = report["tasks"][0]
    assert (row["task"], row["metric"], row["documents"]) == ("ships", "acc", 24)
    for name, model in (("against", "dense"), ("model", "out")):
        loaded = load(place / model, dtype="float32")
        expected = arc_easy(loaded, load_tokenizer(place / model), items)
        assert row[name]["value"] == pytest.approx(expected)
        error = math.sqrt(expected * (1 - expected) / (len(items) - 1))
        assert row[name]["stderr"] == pytest.approx(error)


def test_retention_is_above_chance_where_a_task_states_it(report):
    """Equal documents have equal values; the chance level is subtracted from both."""
    plain, above = report["tasks"]
    dense, ours = (plain[name]["value"] for name in ("against", "model"))
    assert [above[name] for name in ("against", "model")] == [plain["against"], plain["model"]]
    assert plain["retention"] == pytest.approx(ours / dense)
    assert above["retention"] == pytest.approx((ours - 0.1) / (dense - 0.1))


def row(value, better=True, **fields):
    same = {"task": "t", "metric": "m", "filter": "none", "stderr": None}
    return {**same, "value": value, "higher_is_better": better, **fields}


@pytest.mark.parametrize(
    ("dense", "ours", "fields", "retention", "shown"),
    [
        (0.8, 0.6, {}, 0.75, "75.0%"),
        (0.8, 0.6, {"chance": 0.4}, 0.5, "50.0%"),
        (0.4, 0.6, {"chance": 0.4}, None, "unknown: dense is not above chance"),
        (0.0, 0.0, {}, None, "unknown: dense is not above chance"),
        (20.0, 25.0, {"better": False}, None, "unknown: higher is not better"),
    ],
)
def test_retention_is_unknown_without_an_advantage(dense, ours, fields, retention, shown):
    """Above chance only, and of metrics of which more is better; else the table has the reason."""
    made = compared({"against": [row(dense, **fields)], "model": [row(ours, **fields)]})
    assert [each["retention"] for each in made] == [pytest.approx(retention) if retention else None]
    assert retention_text(made[0]) == shown


def test_a_repeated_evaluation_computes_nothing(place, report, capsys):
    """Scores are units: another run reads them, and prints the table."""
    units = {path: path.stat().st_mtime_ns for path in place.glob("out.evaluation/units/*/*/*")}
    code, printed, _ = evaluate(place, capsys)
    after = {path: path.stat().st_mtime_ns for path in place.glob("out.evaluation/units/*/*/*")}
    # the report is written again
    assert (code, len(after), sum(after[path] != units[path] for path in units)) == (0, 5, 1)
    table = printed.splitlines()
    bits = bits_per_weight(json.loads((place / "out" / REPORT_FILE).read_text()))
    assert any(line == f"bits per weight of the linears: {bits:.3f}" for line in table)
    assert table[-3].split() == ["task", "metric", "documents", "dense", "out", "retention"]
    kept = f"{report['tasks'][0]['retention']:.1%}"
    assert (table[-2].split()[:3], table[-2].split()[-1]) == (["ships", "acc", "24"], kept)


def test_pages_show_tasks(place, report, tmp_path):
    """The report and the comparison have every accuracy, and the retention."""
    row = report["tasks"][0]
    api.evaluate(place / "twin", tasks=["ships"], task_dir=place / "tasks", executor="local")
    alone = read_source(place / "twin").evaluations[0]["tasks"][0]
    assert (alone["model"], alone["retention"]) == (row["model"], None)
    pages = api.report(place / "out", tmp_path / "page.html"), tmp_path / "compared.html"
    api.compare([place / "out", place / "twin"], pages[1])
    for page in pages:
        for shown in (row["model"], row["against"]):
            cell = f"{shown['value']:.4f} ± {shown['stderr']:.4f}"
            assert f">{cell}</td>" in page.read_text()
        assert f">{row['retention']:.1%}</td>" in page.read_text()
    assert "Retention over bytes" in pages[1].read_text()


def test_a_part_of_a_task_is_evaluated_beside_a_text(place, capsys):
    """A limit gives so many documents; perplexity and tasks are in one report."""
    flags = ("--task-limit", "5", "--text", place / "text.txt", "--samples", "2", "--json")
    flags += ("--sequence-length", "48", "--run-dir", place / "both")
    code, printed, _ = evaluate(place, capsys, *flags, tasks="ships")
    found = json.loads(printed)
    assert (code, found["tasks"][0]["documents"]) == (0, 5)
    assert found["models"]["model"]["perplexity"] > 1


def test_an_unknown_task_is_named_before_any_model_is_read(place, capsys):
    """A wrong option is one line with exit code 2."""
    code, _, said = evaluate(place, capsys, "--task-dir", place / "nowhere", tasks="ships")
    assert (code, "is not a directory" in said) == (2, True)
    assert main(["evaluate", str(place / "out"), "--shots", "2", "--text", "t"]) == 2
    assert "no tasks are given" in capsys.readouterr().err
    assert main(["evaluate", str(place / "out")]) == 2
    assert "neither a text nor tasks" in capsys.readouterr().err


def test_a_task_that_fails_is_one_line(place, capsys):
    """Exit code 4, with the name of the task; those before it are kept."""
    code, _, said = evaluate(place, capsys, "--run-dir", place / "partly", tasks="ships,missing")
    assert (code, "error: task missing: " in said) == (4, True)
    assert len([*(place / "partly" / "units").glob("*/*/manifest.json")]) == 2


@pytest.mark.parametrize("verb", ["evaluate", "lm-eval"])
def test_the_extra_is_named_where_it_is_missing(verb, place, capsys, monkeypatch):
    """One line with the package to install, and exit code 2."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    words = {"lm-eval": ["lm-eval", "ls"], "evaluate": ["evaluate", str(place / "out")]}[verb]
    given = ["--tasks", "ships", "--executor", "local"] if verb == "evaluate" else []
    assert main([*words, *given]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("not installed; pip install 'orchestrator[lm-eval]'")


def test_arguments_are_passed_on_as_they_are(capsys):
    """Options of the harness reach it, those named like ours too; its exit code is returned."""
    assert main(["lm-eval", "run", "--help"]) == 0
    assert "--include_path" in capsys.readouterr().out
    assert main(["lm-eval", "--model", "hf", "--verbose"]) == 2
    assert "lm-eval" in capsys.readouterr().err
    assert main(["lm-eval", "--help"]) == 0
    assert "usage: orchestrator lm-eval" in capsys.readouterr().out
