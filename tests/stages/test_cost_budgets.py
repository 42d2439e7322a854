"""Whole runs with a budget of operations or of measured time."""

import json
import shutil
from pathlib import Path

import pytest
from allocation import make_table
from pipeline import contents, run

from orchestrator import retarget
from orchestrator.cli.main import main
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.pages.report import rendered_report
from orchestrator.plan.result import bits_per_weight
from orchestrator.plan.speed import speed_forecast

FEW = {"samples": 2, "sequence_length": 16}
LOCAL = "--executor=local"


def times_of(linears, k_proj=0.0):
    """Return a table with 1 ns a value and 100 ns a call, and more in factors of k and v."""

    def pivoted(each, rank):
        values = rank * each.rank_cost - rank * rank
        return 2e-7 + 1e-9 * values + (k_proj if each.out_features == 32 else 0)

    forms = {"pivoted": pivoted, "low_rank": lambda each, rank: 1e-9 * rank * each.rank_cost}
    return make_table(linears, lambda each: 1e-7 + 1e-9 * each.values, forms)


@pytest.fixture(scope="module")
def linears(llama2):
    return LazyModel.open(llama2).survey().linears


@pytest.fixture(scope="module")
def table(linears, tmp_path_factory):
    """Times by which factors of k and v are never faster than their dense weights."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    file.write_text(json.dumps(times_of(linears, k_proj=1e-5)))
    return str(file)


@pytest.fixture(scope="module")
def made(llama2, text, tmp_path_factory):
    """The default recipe at 0.8 of the values."""
    return run(llama2, tmp_path_factory.mktemp("made") / "out", text, method=None, keep=0.8, **FEW)


@pytest.fixture(scope="module")
def timed(made, table, tmp_path_factory):
    """The same run, cut to 0.8 of the time."""
    out = tmp_path_factory.mktemp("timed") / "out"
    given = {"keep_latency": 0.8, "latency_table": table, "executor": "local"}
    return retarget(made.run_dir, out, **given)


def test_a_size_in_operations_is_cut_from_a_run(made, llama2, text, tmp_path):
    """The bytes of a run of its own; as many operations as values, within the budget."""
    result = retarget(made.run_dir, tmp_path / "cut", keep_flops=0.6, executor="local")
    run(llama2, tmp_path / "alone", text, method=None, keep=None, keep_flops=0.6, **FEW)
    assert contents(result.out) == contents(tmp_path / "alone")
    spent, values = result.report["costs"]["operations"], result.report["values"]
    assert spent == {"dense": values["dense_linears"], "planned": values["stored"]}
    assert 0.6 * spent["dense"] - 4 * 256 < spent["planned"] <= 0.6 * spent["dense"]
    assert result.report["kept"]["asked_of"] == "operations"


def test_a_size_in_time_is_cut_from_a_run(timed, table, llama2, text, tmp_path):
    """The bytes of a run of its own; times are those of the table for the plan, within the budget,
    and linears that no factors make faster are dense."""
    size = {"keep": None, "keep_latency": 0.8, "latency_table": table}
    run(llama2, tmp_path / "alone", text, method=None, **size, **FEW)
    assert contents(timed.out) == contents(tmp_path / "alone")
    planned = dense = 0.0
    for name, entry in timed.report["linears"].items():
        (outputs, inputs), rank = entry["shape"], entry.get("rank")
        by_hand = 1e-7 + 1e-9 * outputs * inputs
        dense += by_hand
        if rank is not None:
            by_hand = 2e-7 + 1e-9 * (rank * (outputs + inputs) - rank * rank)
        planned += by_hand
        if outputs == 32:
            assert entry["why_dense"] == "no allowed rank costs less than the dense weight"
        assert rank is not None or outputs == 32 or "share" in entry["why_dense"], name
    times = timed.report["costs"]["microseconds"]
    assert times["dense"] == pytest.approx(1e6 * dense)
    # ranks between measured ones, at curved times, are read from a line below them
    assert times["planned"] == pytest.approx(1e6 * planned, rel=1e-3)
    assert 0.8 * times["dense"] - 1.1 < times["planned"] <= 0.8 * times["dense"]


def test_the_forecast_is_shown(timed, made, table, capsys):
    """In the report as text and as JSON, and on its page: for a size in values a bound by
    operations and bytes, with a table the time too."""
    bounds = speed_forecast(made.report)["at_most"]
    values, sizes = made.report["values"], made.report["bytes"]
    assert bounds["prefill"] == values["dense_linears"] / values["stored"]
    assert bounds["decode"] == sizes["dense_linears"] / sizes["stored"]
    page = str(rendered_report(made.out))
    assert f"at most {bounds['prefill']:.2f} x" in page
    assert "by operations and bytes of the linears alone" in page
    times = timed.report["costs"]["microseconds"]
    said = f"{times['dense'] / times['planned']:.2f} x"
    assert said in str(rendered_report(timed.out))
    again = ["retarget", str(made.run_dir), str(timed.out), LOCAL, "--keep-latency=0.8"]
    again.append(f"--latency-table={table}")
    assert main(again) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("kept fraction of the targeted linears, in time")
    assert f"{said} {times['planned']:,.0f} us of the linears at 1 token" in shown
    assert "left dense" in shown
    assert main([*again, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bits_per_weight"] == bits_per_weight(shown)
    found = shown["speed_forecast"]
    assert found["measured"]["speed"] == times["dense"] / times["planned"]
    assert found["at_most"].keys() == {"prefill", "decode"}


def test_a_table_forecasts_the_speed_of_other_sizes(made, table, tmp_path, capsys):
    """`--keep` with a table has its plan, and its time; a later size in values has none of it."""
    given = ["retarget", str(made.run_dir), LOCAL, "--json"]
    asked = [str(tmp_path / "timed"), "--keep=0.8", f"--latency-table={table}"]
    assert main([*given, *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["linears"] == made.report["linears"]
    assert report["costs"]["limited"] == "values"
    assert report["speed_forecast"]["measured"]["tokens"] == 1


def test_shared_bases_are_multiplied_by_every_linear(llama2, text, tmp_path):
    """Operations of a group are those of its members, more than its values."""
    size = {"keep": None, "keep_flops": 0.7, "method": "basis-sharing"}
    options = {"basis-sharing": {"refit": "never"}}
    report = run(llama2, tmp_path / "out", text, **size, options=options, **FEW).report
    by_hand = 0
    for entry in report["linears"].values():
        outputs, inputs = entry["shape"]
        rank = entry.get("rank")
        by_hand += outputs * inputs if rank is None else rank * (outputs + inputs)
    spent = report["costs"]["operations"]
    assert spent["planned"] == by_hand <= 0.7 * spent["dense"]
    assert by_hand > report["values"]["stored"]


@pytest.mark.parametrize(
    ("flags", "about", "code", "says"),
    [
        (["--keep-flops=0.5", "--keep=0.5"], {}, 2, "keep and keep_flops given"),
        (["--keep-latency=0.5", "TABLE", "--rank-multiple=1"], {}, 2, "give rank_multiple auto"),
        (["--keep-latency=0.5", "TABLE"], {"dtype": "bfloat16"}, 2, "times in bfloat16 on cpu"),
        (["--keep-latency=0.5", "TABLE"], {"linears": []}, 4, "no linear of"),
        (["--keep-latency=0.5", "TABLE"], {"linears": [{}]}, 4, "a field is missing"),
        (["--keep-latency=0.5", "TABLE"], {"format_version": 2}, 4, "format_version is 2"),
        (["--keep-latency=0.5", "--latency-table=no.json"], {}, 4, "no.json does not exist"),
        (["--keep-latency=0.05", "TABLE"], {}, 3, "the least possible is 0."),
        (["--keep-flops=0.01"], {}, 3, "the least possible is 0."),
    ],
)
def test_sizes_that_cannot_be_met_are_refused(
    flags, about, code, says, made, linears, tmp_path, capsys
):
    """One line says what is wrong, before anything is computed."""
    file = tmp_path / "table.json"
    file.write_text(json.dumps(times_of(linears) | about))
    given = [f"--latency-table={file}" if flag == "TABLE" else flag for flag in flags]
    out = tmp_path / "out"
    assert main(["retarget", str(made.run_dir), str(out), LOCAL, *given]) == code
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_settings_that_exclude_each_other_are_refused(llama2, capsys):
    """Operations of a method that keeps entries; time without a table."""
    assert main(["plan", str(llama2), "--method=wanda", "--keep-flops=0.5"]) == 2
    assert "multiplied as a dense one" in capsys.readouterr().err
    assert main(["plan", str(llama2), "--keep-latency=0.5"]) == 2
    assert "keep_latency without a latency_table" in capsys.readouterr().err


def test_a_table_with_other_times_is_another_recipe(timed, made, table, tmp_path, capsys):
    """The finished result is not taken for that of a changed table; of the same one it is."""
    out = shutil.copytree(timed.out, tmp_path / "out")
    changed = tmp_path / "table.json"
    again = ["retarget", str(made.run_dir), str(out), LOCAL, "--keep-latency=0.8"]
    value = json.loads(Path(table).read_text())
    for times, code in ((2e-7, 2), (value["linears"][0]["dense_seconds"], 0)):
        value["linears"][0]["dense_seconds"] = times
        changed.write_text(json.dumps(value))
        shutil.copy(changed, table)
        assert main([*again, f"--latency-table={table}"]) == code
    assert "made from another recipe" in capsys.readouterr().err


def test_plan_takes_the_sizes(llama2, table, text, capsys):
    """The result has as many values as an even plan; one that no plan meets is infeasible."""
    given = ["plan", str(llama2), f"--calibration={text}", "--json"]
    assert main([*given, "--keep-flops=0.6"]) == 0
    flops = json.loads(capsys.readouterr().out)["final"]["values"]
    assert main([*given, "--keep=0.6"]) == 0
    assert flops == pytest.approx(json.loads(capsys.readouterr().out)["final"]["values"], rel=0.02)
    assert main([*given, "--keep-latency=0.7", f"--latency-table={table}"]) == 0
    assert json.loads(capsys.readouterr().out)["final"]["values"] > 0
    assert main([*given, "--keep-latency=0.01", f"--latency-table={table}"]) == 3
    assert "the least possible is" in capsys.readouterr().err
