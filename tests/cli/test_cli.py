"""Command line: arguments to calls, results to text, errors to exit codes."""

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers
from byte_tokenizer import bytes_tokenizer

from orchestrator import api
from orchestrator.cli.main import main
from orchestrator.errors import (
    InfeasibleError,
    InputError,
    StoppedError,
    UsageError,
    WorkerError,
)
from orchestrator.evaluation import EvaluationRequest
from orchestrator.plan.plan import Plan
from orchestrator.plan.result import Result
from orchestrator.recipe.field import about, described
from orchestrator.recipe.recipe import Recipe, make_recipe
from orchestrator.version import __version__

COMMANDS = ("compress", "evaluate", "export", "status", "report", "compare", "clean")


@pytest.fixture
def compressed(monkeypatch):
    """The recipes passed to the API, which returns a result without any work."""
    recipes = []

    def compress(recipe, on_event):
        recipes.append(recipe)
        unit = "values" if recipe.keep_bytes is None else "bytes"
        on_event({"event": "note", "text": "here"})
        report = {
            "kept": {"asked": recipe.requested, "asked_of": unit, "linears": 0.79, "model": 0.85},
            "values": {"model_before": 1000, "model_after": 850},
            "bytes": {"dense_linears": 2000, "stored": 1600},
        }
        plan = Plan(assignments={}, budget_values=0, stored_values=0)
        return Result(out=Path(recipe.out), run_dir=Path("run"), plan=plan, report=report)

    monkeypatch.setattr(api, "compress", compress)
    return recipes


def error_of(capsys):
    """Return the error line of a failed command."""
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("orchestrator: error: ")
    return line


def test_version_and_help(capsys):
    """`--version` and every `--help` end with 0."""
    calls = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)]
    for call in calls:
        with pytest.raises(SystemExit) as ended:
            main(call)
        assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"orchestrator {__version__}\n")


def test_version_is_that_of_the_libraries_too(capsys):
    """`--version` has the versions that the imported libraries state, one line each."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.splitlines() == [
        f"orchestrator {__version__}",
        f"Python {platform.python_version()}",
        f"ray {metadata.version('ray')}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]


def test_runs_as_a_module():
    """`python -m orchestrator` is the same program."""
    call = [sys.executable, "-m", "orchestrator", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(Path(api.__file__).parent.parent)}
    assert subprocess.check_output(call, env=environment, text=True).startswith("orchestrator ")


@pytest.mark.parametrize(
    ("command", "owner"), [("compress", Recipe), ("evaluate", EvaluationRequest)]
)
def test_every_field_is_a_flag_with_its_help_text(command, owner, monkeypatch, capsys):
    """The help of a command has the flag, the choices and the help text of every field."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    flags = described(owner)
    assert {field.name for field in fields(owner)} - {*flags} <= {"options"}
    for name, field in flags.items():
        is_positional = name == "model" or (name, command) == ("out", "compress")
        flag = name.upper() if is_positional else f"--{name.replace('_', '-')}"
        assert flag in shown
        assert about(field).help in shown
        assert ",".join(about(field).choices) in shown


def test_flags_reach_the_recipe(compressed):
    """Every flag sets its field; other fields have the recipe's defaults."""
    flags = (
        "--keep 0.5 --calibration t.txt --samples 3 --sampling random --target *.mlp.* "
        "--target re:.*q_proj --ignore a --download --workers 2 --run-dir r --max-shard-size 1MB"
    )
    assert main(["compress", "dense", "small", *flags.split()]) == 0
    assert compressed == [
        Recipe(
            model="dense",
            out="small",
            keep=0.5,
            calibration="t.txt",
            samples=3,
            sampling="random",
            target=("*.mlp.*", "re:.*q_proj"),
            ignore=("a",),
            download=True,
            workers=2,
            run_dir="r",
            max_shard_size="1MB",
        )
    ]


def test_flags_win_over_the_recipe_file(compressed, tmp_path):
    """A field is that of the flag, else of the file, else the default."""
    file = tmp_path / "recipe.toml"
    written = make_recipe(
        {"model": "dense", "out": "small", "keep": 0.5, "seed": 7, "download": True}
    )
    file.write_text(written.to_toml())
    arguments = ["compress", "other", "--recipe", str(file), "--keep", "0.25", "--no-download"]
    assert main(arguments) == 0
    assert compressed == [make_recipe({"model": "other", "out": "small", "keep": 0.25, "seed": 7})]


def test_result_on_stdout_and_progress_on_stderr(compressed, capsys):
    """A result can be piped; events are separate, as lines or as JSON."""
    assert main(["compress", "dense", "small", "--keep", "0.8"]) == 0
    said = capsys.readouterr()
    assert "\nkept fraction of the targeted linears, in bytes   0.8000\n" in said.out
    assert said.err.endswith("] here\n")
    arguments = ["compress", "dense", "small", "--keep", "0.8", "--json", "--progress", "json"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["kept"]["model"] == 0.85
    assert json.loads(said.err) == {"event": "note", "text": "here"}


@pytest.mark.parametrize(("unit", "flag"), [("values", "--keep"), ("bytes", "--keep-bytes")])
def test_a_size_is_shown_beside_the_request_in_its_unit(compressed, capsys, unit, flag):
    """The fraction in the other unit is a line of its own, without the request."""
    assert main(["compress", "dense", "small", flag, "0.7"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    shown = {"values": "0.7900", "bytes": "0.8000"}
    asked = shown.pop(unit)
    assert first.endswith(f", in {unit}{' ' * (8 - len(unit))}{asked} (requested 0.7)")
    assert second.endswith(*shown.values())


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_evaluate_passes_what_was_given(monkeypatch, capsys, json_flag):
    """`evaluate` passes the given flags on, and prints both models in one table."""
    given = {}

    def evaluate(model, *, on_event, **options):
        given.update(options, model=model)
        one = {
            "path": model,
            "perplexity": 10.0,
            "parameters": 1000,
            "bytes": 2000,
            "prefill_tokens_per_second": 3.0,
            "decode_tokens_per_second": None,
        }
        return {
            "models": {"model": one, "against": {**one, "path": "dense", "perplexity": 9.5}},
            "kl": 0.25,
            "top1_agreement": 0.875,
            "predictions": 511,
            "memory": {"host": 10**9},
        }

    monkeypatch.setattr(api, "evaluate", evaluate)
    flags = "--against dense --text t.txt --stride 17 --dtype float32"
    assert main(["evaluate", "small", *flags.split(), *json_flag]) == 0
    assert given == {
        "model": "small",
        "against": "dense",
        "text": "t.txt",
        "stride": 17,
        "dtype": "float32",
    }
    shown = capsys.readouterr().out
    if json_flag:
        assert json.loads(shown)["kl"] == 0.25
    else:
        rows = [line.split() for line in shown.splitlines()]
        assert rows[:2] == [["dense", "small"], ["perplexity", "9.50", "10.00"]]
        assert "same top token for 87.5%" in shown
        assert "511 predictions, peak memory of a worker: host 1 GB" in shown


def test_another_model_is_not_called_the_dense_one(monkeypatch, capsys):
    """The comparison has its name, and a line says that it is not the model that was compressed."""
    names = ("perplexity", "parameters", "bytes", "prefill_tokens_per_second")
    one = {**dict.fromkeys(names, 1), "decode_tokens_per_second": None}
    models = {"model": {**one, "path": "a/small"}, "against": {**one, "path": "a/other"}}
    report = {"models": models, "kl": 0.25, "top1_agreement": 0.5, "predictions": 3}
    report["against_is_base"] = False
    monkeypatch.setattr(api, "evaluate", lambda model, **given: report)
    assert main(["evaluate", "small", "--against", "other", "--text", "t.txt"]) == 0
    shown = capsys.readouterr().out
    assert "divergence from other 0.2500 nats" in shown
    assert "\nother is not the model that small was compressed from\n" in shown


def test_export(monkeypatch, capsys):
    """`export` prints the written path."""
    monkeypatch.setattr(api, "export", lambda out, dense_dir, format: f"{out} {dense_dir} {format}")
    assert main(["export", "small", "dense"]) == 0
    assert capsys.readouterr().out == "small dense dense\n"


def test_status_and_clean(tmp_path, capsys):
    """`status` reads a run from its directory; `clean` removes that directory, and no other."""
    from orchestrator.store.run import RunDirectory

    run = RunDirectory(tmp_path / "run")
    run.claim({})
    counts = {"done": 3, "total": 30, "workers": 4, "nodes": 2, "failures": 1, "left": 95.0}
    counts |= {"progress": {"done": 312, "total": 960, "of": "chunks", "fraction": 0.25}}
    run.write_status(state="stopped", exit_code=75, stage="calibrate", run_left=3720.0, **counts)
    run.record_output(tmp_path / "out-0.8", {"kept": 0.8, "of": "values", "parameters": 1000})
    run.record_output(tmp_path / "out-0.6", {"kept": 0.6, "of": "values", "parameters": 900})
    assert main(["status", str(run.root)]) == 0
    rows = (line.split("  ", maxsplit=1) for line in capsys.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in rows}
    assert (shown["state"], shown["exit_code"], shown["units"]) == ("stopped", "75", "3 of 30")
    assert shown["stage"] == f"calibrate [{'#' * 6}{'.' * 18}] 25%"
    assert shown["chunks"] == "312 of 960"
    assert shown["left of the run"] == "about 1h02m"
    assert shown["output 1"] == f"{tmp_path}/out-0.8 (keep 0.8 of values, 1,000 parameters)"
    assert shown["output 2"].startswith(f"{tmp_path}/out-0.6")
    assert (shown["workers"], shown["nodes"], shown["failures"]) == ("4", "2", "1")
    assert shown["left of the stage"] == "about 1m35s"
    assert main(["status", str(run.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["total"], found["progress"]["of"], len(found["outputs"])) == (30, "chunks", 2)
    assert main(["clean", str(run.root)]) == 0
    assert not run.root.exists()
    assert capsys.readouterr().out == f"removed {run.root}\n"
    assert main(["clean", str(tmp_path)]) == InputError.exit_code
    assert tmp_path.exists()
    error_of(capsys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong flag"), 2),
        (InfeasibleError("too small"), 3),
        (InputError("damaged"), 4),
        (StoppedError("stopped"), 75),
        (WorkerError("unit failed\nTraceback"), 1),
        (KeyboardInterrupt(), 75),
        (OSError(28, "No space left on device", "out/model.safetensors"), 1),
    ],
)
def test_errors_are_one_line_and_a_code(monkeypatch, capsys, error, code):
    """An error is one line on stderr with its exit code; a traceback needs `--verbose`."""

    def status(run):
        raise error

    monkeypatch.setattr(api, "status", status)
    assert main(["status", "run"]) == code
    error_of(capsys)
    assert main(["status", "run", "--verbose"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_ends_with_75(monkeypatch, capsys):
    """SIGTERM ends any command with 75, and restores the signal handler."""
    monkeypatch.setattr(api, "status", lambda run: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["status", "run"]) == 75
    assert error_of(capsys).endswith("stopped by SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "required: COMMAND; see orchestrator --help"),
        ("comprss", "unknown command comprss; near misses: compress, compare; see"),
        ("frobnicate", "unknown command frobnicate; commands: methods, plan, measure, compress"),
        ("completion fish", "shell fish: must be one of bash, zsh, tcsh"),
        ("compress a b --keep much", "--keep much: must be a fraction such as 0.8"),
        ("compress a b --samples 1.5", "--samples 1.5: must be a whole number"),
        ("plan a --price ''", "--price '': must be a number"),
        ("compress a b --sampling last", "--sampling last: must be one of first, random"),
        ("compress a b --sample 3", "unknown flag --sample; near misses: --samples, --sampling"),
        ("compress a b c", "surplus argument c; see orchestrator compress --help"),
        ("evaluate", "required: MODEL; see orchestrator evaluate --help"),
        ("export a b --format gguf", "--format gguf: must be one of dense"),
    ],
)
def test_wrong_arguments_end_with_2(arguments, says, capsys):
    """Arguments refused by the parser, abbreviations included, end with 2 and one line: for a wrong
    value the allowed ones, else the help to read."""
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(arguments))
    assert ended.value.code == 2
    assert says in error_of(capsys)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ([], 2, "recipe: none of keep, keep_bytes, keep_flops, keep_latency, keep_cache given"),
        (["--keep", "1.5"], 2, "keep is 1.5"),
        (["--keep", "nan"], 2, "keep is nan"),
        (["--keep", "0.8", "--recipe", "none.toml"], 2, "none.toml"),
        (["--keep", "0.8", "--method", "svd-lm"], 2, "svd-llm"),
        (["--keep", "0.8", "--max-shard-size", "big"], 2, "'big'"),
        (
            ["--keep", "0.8", "--target", "*.mlp.down_prj"],
            2,
            "near misses: model.layers.*.mlp.down",
        ),
        (["--keep", "0.8", "--calibration", "none.txt"], 4, "none.txt: no such text"),
        (["--keep", "0.8", "--samples", "9"], 4, "tokens give"),
        (["--keep", "80"], 2, "did you mean 0.8 or 80%?"),
        (["--keep", "0.8", "--calibration", "chat.jsonl"], 4, "chat.jsonl, line 1, message 1: "),
        (["--keep", "0.8", "--calibration", "latin.txt"], 4, "at offset 3 is not UTF-8"),
        (["--keep", "0.8", "--calibration", "fields.jsonl"], 4, "fields found: body"),
    ],
)
def test_bad_input(checkpoint, tmp_path, monkeypatch, capsys, flags, code, says):
    """Bad input ends with its code and a line that names it, without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("latin.txt").write_bytes(b"caf\xe9 and more of it")
    Path("fields.jsonl").write_text('{"body": "text"}\n')
    Path("chat.jsonl").write_text('{"messages": [{"content": "Hello"}]}\n')
    if "--calibration" not in flags:
        flags = [*flags, "--calibration", "short.txt"]
    shutil.copytree(checkpoint("llama"), "dense")
    bytes_tokenizer().save_pretrained("dense")
    capsys.readouterr()
    assert main(["compress", "dense", "out", "--executor", "local", *flags]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, lines
    assert says in lines[0]
    assert not Path("out/config.json").exists()


@pytest.mark.parametrize(
    ("model", "says"), [("none/at/all", "no such directory"), ("empty", "config")]
)
def test_bad_model(tmp_path, monkeypatch, capsys, model, says):
    """A missing or invalid model ends with 4 and its path."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    arguments = ["compress", model, "out", "--keep", "0.8", "--calibration", "bundled"]
    assert main([*arguments, "--executor", "local"]) == 4
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_reader_that_has_gone_ends_the_command_without_a_word(monkeypatch, capsys):
    """`orchestrator methods | head` prints no traceback, also where the interpreter exits."""
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as changed, os.fdopen(writing, "w") as broken:
        changed.setattr(sys, "stdout", broken)
        assert main(["methods"]) == 1
        broken.flush()
    assert capsys.readouterr() == ("", "")
