"""The command line: words into calls of `orchestrator.api`, results into text, errors into codes.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or
data invalid, 75 stopped and resumable, 1 other. Nothing heavy is imported before a command runs.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from orchestrator import __version__
from orchestrator.errors import OrchestratorError, StoppedError, UsageError
from orchestrator.progress import JsonLines, Lines, duration, size
from orchestrator.recipe import (
    CHOICES,
    PRESETS,
    Recipe,
    make_recipe,
    parse_option,
    parse_vary,
    read_recipe_fields,
)
from orchestrator.result import Result

HELP = {
    "keep": "values to keep of the targeted linears, above 0, at most 1",
    "keep_bytes": "the same in bytes, indices included; instead of --keep",
    "method": "published method",
    "allocation": "how the budget is divided over the linears",
    "storage": "factors as they are, or pivoted: the same weight in fewer values",
    "compensate": "fit factors again to the compressed model's inputs, towards the dense outputs "
    "on these (input), on the dense model's own (anchored), or between (blend)",
    "refine": "train what is cut towards what the dense blocks give: nothing, all blocks apart, "
    "in order each behind the compressed ones, or swept: apart and then in order",
    "train": "train the whole compressed model: all, lean or light in memory, or nothing",
    "calibration": ".txt, .jsonl, .parquet, a directory of them, datasets:NAME[:CONFIG[:SPLIT]]",
    "calibration_field": "field of records that holds the text",
    "samples": "sequences",
    "sequence_length": "tokens in a sequence",
    "sampling": "the first sequences, or random ones drawn with the seed",
    "layout": "packed windows of the joined text, or padded documents",
    "seed": "seed of everything random",
    "target": "linears to compress: a name, a glob or re:REGEX; may be repeated",
    "ignore": "linears to leave dense, in the same words; wins over --target",
    "dtype": "of the forward passes",
    "output_dtype": "of the factors that are written",
    "max_shard_size": "largest file of the checkpoint",
    "revision": "of a hub id",
    "download": "let a hub id be downloaded when the local cache lacks it",
    "executor": "actors of Ray, or the same units in this process",
    "address": "Ray cluster to join: auto or an address; a local Ray without it",
    "workers": "actors; one a GPU, or one a CPU where there are no GPUs, without it",
    "threads": "of an actor; one without it",
    "shards": "contiguous cuts of the model; at most two blocks each without it",
    "run_dir": "run directory; OUT.run without it",
}
METAVARS: dict[Any, str] = {int: "N", float: "FRACTION", str: "NAME"} | {
    "address": "ADDRESS",
    "calibration": "TEXT",
    "max_shard_size": "SIZE",
    "run_dir": "DIR",
}
EVALUATION_ROWS: dict[str, Callable[[Any], str]] = {
    "perplexity": "{:.2f}".format,
    "parameters": "{:,}".format,
    "bytes": "{:,}".format,
    "prefill_tokens_per_second": "{:,.1f}".format,
    "decode_tokens_per_second": "{:,.1f}".format,
}
FIELDS = {field.name: field for field in fields(Recipe)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit code. Wrong arguments leave through SystemExit(2)."""
    options = _parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        code: int | None = options.command(options)
        return code or 0
    except KeyboardInterrupt:
        return _complain("stopped by the keyboard", StoppedError.exit_code, options.verbose)
    except OrchestratorError as error:
        return _complain(str(error), error.exit_code, options.verbose)
    except OSError as error:
        return _complain(str(error), 1, options.verbose)
    finally:
        # a run that was stopped leaves it ignored
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError(f"stopped by {signal.Signals(number).name}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGTERM and SIGINT end the command with 75 also while no run is there to be stopped.

    That is for seconds: packages are imported, a model is looked up. Nothing is to be cleaned up
    yet, and an exception would go through imports that turn it into others, so it ends on the spot.
    After a run was stopped there is only the exit left, which nothing should disturb.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield
    except StoppedError:
        previous = dict.fromkeys(numbers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"orchestrator: error: stopped by {name} before the run began\n"
    os.write(sys.stderr.fileno(), line.encode())
    os._exit(StoppedError.exit_code)


def _complain(message: str, exit_code: int, verbose: bool) -> int:
    first, *more = message.strip().splitlines() or ["no message"]
    if verbose:
        traceback.print_exc()
    elif more:
        first += " (--verbose shows the rest)"
    print(f"orchestrator: error: {first}", file=sys.stderr)
    return exit_code


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that a file and the flags say; flags win."""
    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    written = read_recipe_fields(options.recipe) if "recipe" in options else {}
    for text in vars(options).get("option", ()):
        name, option, value = parse_option(text)
        table = written.get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"option {text}: {name} is a field of the recipe, not a table")
        written[name] = {**table, option: value}
    if {"keep", "keep_bytes"} & given.keys():
        # one of the two on the command line stands for either of them in the file
        written = {name: v for name, v in written.items() if name not in ("keep", "keep_bytes")}
    preset = {"preset": options.preset} if "preset" in options else {}
    return make_recipe({**written, **given, **preset})


def _compress(options: argparse.Namespace) -> None:
    from orchestrator import api

    recipe = _recipe(options)
    with _stoppable():
        result = api.compress(recipe, on_event=_progress(options))
    _print_result(result, options.json)


def _search(options: argparse.Namespace) -> None:
    from orchestrator import api

    recipe, vary = _recipe(options), dict(map(parse_vary, options.vary))
    names = {"field": "text_field", "samples": "text_samples", "stride": "stride"}
    given = {name: getattr(options, flag) for name, flag in names.items() if flag in options}
    given |= {"sequence_length": recipe.sequence_length}
    with _stoppable():
        found = api.search(recipe, vary, text=options.text, on_event=_progress(options), **given)
    if not options.json:
        for candidate in found.candidates:
            setting = ", ".join(f"{name}={value}" for name, value in candidate.setting.items())
            mark = "  best" if candidate is found.best else ""
            print(f"{candidate.perplexity:12.2f}  {candidate.kept:.4f}  {setting}{mark}")
    _print_result(found.result, options.json)


def _print_result(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.report, indent=2))
        return
    kept, values = result.report["kept"], result.report["values"]
    asked = f"asked {kept['asked']:g} of {kept['asked_of']}"
    _print_rows(
        {
            "kept of the targeted linears": f"{kept['linears']:.4f} ({asked})",
            "kept of the whole model": f"{kept['model']:.4f}",
            "parameters": f"{values['model_before']:,} before, {values['model_after']:,} after",
            "checkpoint": result.out,
            "run directory": result.run_dir,
        }
    )


def _evaluate(options: argparse.Namespace) -> None:
    from orchestrator import api

    taken = vars(options).keys() - {"command", "json", "model", "progress", "verbose"}
    arguments = {name: getattr(options, name) for name in taken}
    with _stoppable():
        report = api.evaluate(options.model, on_event=_progress(options), **arguments)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_evaluation(report)


def _export(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.export(options.out, options.dense_dir, format=options.format))


def _status(options: argparse.Namespace) -> None:
    from orchestrator import api

    status = api.status(options.run)
    if options.json:
        print(json.dumps(status, indent=2))
        return
    shown = {"run": options.run, **status}
    for name in ("started", "updated"):
        if name in shown:
            shown[name] = f"{duration(max(time.time() - shown[name], 0.0))} ago"
    if "done" in shown and "total" in shown:
        shown["done"] = f"{shown['done']} of {shown.pop('total')}"
    if "left" in shown:
        shown["left"] = f"about {duration(shown['left'])}"
    _print_rows(shown)


def _report(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.report(options.run, vars(options).get("output")))


def _compare(options: argparse.Namespace) -> None:
    from orchestrator import api

    print(api.compare(options.runs, vars(options).get("output")))


def _clean(options: argparse.Namespace) -> None:
    from orchestrator import api

    api.clean(options.run)
    print(f"removed {options.run}")


def _submit(options: argparse.Namespace) -> int:
    from orchestrator import api

    program = _parser().parse_args(options.program)
    if program.command is _submit:
        raise UsageError("submit: the job's command cannot be submit itself")
    written = read_recipe_fields(program.recipe) if "recipe" in program else {}
    for name in ("out", "run_dir"):
        path = vars(program).get(name) or written.get(name) or "/"
        if isinstance(path, str) and "://" not in path and not Path(path).is_absolute():
            raise UsageError(
                f"{name}: {path} would lie in the job's own directory and go with it; "
                "give the whole path of a place that all nodes see"
            )
    names = ("address", "retries", "working_dir", "exclude")
    given = {name: getattr(options, name) for name in names if name in options}
    given["env"] = dict(map(_variable, vars(options).get("env", ())))
    if options.no_wait and "retries" in given:
        raise UsageError("--retries: with --no-wait nobody is there to submit the job again")
    with _stoppable():
        return api.submit(
            options.program,
            wait=not options.no_wait,
            say=partial(print, file=sys.stderr, flush=True),
            **given,
        )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--env {text}: NAME=VALUE was expected")
    return name, value


def _progress(options: argparse.Namespace) -> Lines | JsonLines:
    return JsonLines(sys.stderr) if options.progress == "json" else Lines(sys.stderr)


def _print_evaluation(report: Mapping[str, Any]) -> None:
    """One row a quantity, one column a model, the dense one first; then what compares the two."""
    models = [report["models"][name] for name in ("against", "model") if name in report["models"]]
    table = [["", *(Path(model["path"]).name for model in models)]]
    for name, shown in EVALUATION_ROWS.items():
        values = [model[name] for model in models]
        label = name.replace("_", " ")
        table.append([label, *("unknown" if v is None else shown(v) for v in values)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for label, *cells in table:
        shown_cells = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"{label:<{widths[0]}}", *shown_cells]).rstrip())
    if "kl" in report:
        print(f"mean KL from the dense model {report['kl']:.4f} nats, ", end="")
        print(f"same first token on {report['top1_agreement']:.1%}")
    print(f"{report['predictions']:,} predictions, ", end="")
    print(f"peak memory of a worker {size(report['peak_worker_bytes'])}")


def _print_rows(rows: Mapping[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orchestrator",
        description="Compresses large language models on a Ray cluster.",
        epilog="Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or data invalid, "
        "75 stopped and resumable, 1 other.",
    )
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_compress(commands)
    _add_search(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_status(commands)
    _add_report(commands)
    _add_compare(commands)
    _add_clean(commands)
    _add_submit(commands)
    return parser


def _add_compress(commands: Any) -> None:
    parser = _command(commands, "compress", _compress, "make a smaller model out of a dense one")
    _add_recipe(parser)


def _add_search(commands: Any) -> None:
    parser = _command(
        commands, "search", _search, "compress with several settings, keep what held-out text likes"
    )
    _add_recipe(parser)
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="NAME=VALUE,...",
        help="values to try of a flag, storage=plain,pivoted, or an option, mgaa.t=0.5,1; "
        "may be repeated, every combination is tried",
    )
    parser.add_argument(
        "--text", metavar="TEXT", required=True, help=f"held-out text: {HELP['calibration']}"
    )
    parser.add_argument("--text-field", metavar="NAME", help=HELP["calibration_field"])
    parser.add_argument("--text-samples", metavar="N", type=int, help="sequences of held-out text")
    parser.add_argument("--stride", metavar="N", type=int, help="take each N-th sequence only")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """The flags of a recipe, and how it is told of."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="directory or hub id")
    parser.add_argument("out", metavar="OUT", nargs="?", help="directory of the result")
    parser.add_argument(
        "--recipe", metavar="FILE", type=Path, help="TOML with these flags as keys; flags win"
    )
    for name in HELP:
        _add_field(parser, FIELDS[name])
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="recipe that a name stands for, what else is given wins; fast: the best closed form, "
        "best: that, trained",
    )
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME.OPTION=VALUE",
        help="option of a method or an allocation, mgaa.t=0.5; may be repeated",
    )
    _add_progress(parser)
    _add_json(parser, "print the whole report")


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "perplexity, agreement with the dense model, speed, size"
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id, dense or compressed")
    parser.add_argument("--against", metavar="DENSE", help="dense model to compare with")
    parser.add_argument(
        "--text", metavar="TEXT", required=True, help=f"held-out text: {HELP['calibration']}"
    )
    parser.add_argument("--field", metavar="NAME", help=HELP["calibration_field"])
    parser.add_argument("--stride", metavar="N", type=int, help="take each N-th sequence only")
    for name in ("samples", "sequence_length", "layout", "dtype"):
        _add_field(parser, FIELDS[name], shows_default=False)
    for name in ("executor", "address", "workers", "threads", "shards"):
        _add_field(parser, FIELDS[name])
    parser.add_argument("--run-dir", metavar="DIR", help="run directory; MODEL.evaluation without")
    _add_progress(parser)
    _add_json(parser, "print the result as JSON")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "a compressed checkpoint in a form that other programs know"
    )
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("dense_dir", metavar="DENSE_DIR", help="directory to write")
    parser.add_argument(
        "--format", choices=("dense",), default="dense", help="dense: factors multiplied back"
    )


def _add_status(commands: Any) -> None:
    parser = _command(commands, "status", _status, "where a run stands, from its directory alone")
    parser.add_argument("run", metavar="RUN", help="run directory")
    _add_json(parser, "print the status as JSON")


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _report, "one HTML page that shows a run")
    parser.add_argument("run", metavar="RUN", help="run directory, or a compressed checkpoint")
    parser.add_argument(
        "--output", metavar="FILE", help="the page; RUN/report.html or OUT.report.html without it"
    )


def _add_compare(commands: Any) -> None:
    parser = _command(commands, "compare", _compare, "one HTML page that puts runs side by side")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directories, or compressed checkpoints"
    )
    parser.add_argument("--output", metavar="FILE", help="the page; comparison.html without it")


def _add_clean(commands: Any) -> None:
    parser = _command(commands, "clean", _clean, "remove a run directory")
    parser.add_argument("run", metavar="RUN", help="run directory")


def _add_submit(commands: Any) -> None:
    parser = _command(
        commands, "submit", _submit, "run a command as a Ray job, again while that may help"
    )
    parser.usage = "%(prog)s [options] -- COMMAND ..."
    parser.add_argument(
        "program", metavar="COMMAND", nargs="+", help="compress or another, with its arguments"
    )
    parser.add_argument(
        "--address", metavar="URL", help="dashboard, http://HEAD:8265; what Ray finds without it"
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=int,
        help="attempts after the first; what is wrong with the command is not tried again "
        "(default: 3)",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="directory that travels with the job (default: .)"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="what of it stays behind, besides .venv, .work, .git and what .gitignore names; "
        "may be repeated",
    )
    parser.add_argument(
        "--env", action="append", metavar="NAME=VALUE", help="variable of the job; may be repeated"
    )
    parser.add_argument(
        "--no-wait",
        action="store_true",
        default=False,
        help="print the submission id and leave the job alone",
    )


def _command(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int | None], says: str
) -> argparse.ArgumentParser:
    """A parser that leaves out of its result what was not given: defaults live in one place."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=says, description=says, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--verbose", action="store_true", help="errors with their traceback")
    parser.set_defaults(command=command, verbose=False, json=False)
    return parser


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress", choices=("lines", "json"), default="lines", help="form of events on stderr"
    )


def _add_json(parser: argparse.ArgumentParser, says: str) -> None:
    parser.add_argument("--json", action="store_true", help=says)


def _add_field(
    parser: argparse.ArgumentParser, field: Field[Any], *, shows_default: bool = True
) -> None:
    """The flag of a recipe field."""
    says = HELP[field.name]
    if shows_default and isinstance(field.default, str | int) and field.name != "download":
        says += f" (default: {field.default})"
    flag = "--" + field.name.replace("_", "-")
    kind: Any = field.type
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=says)
    elif kind == tuple[str, ...]:
        parser.add_argument(flag, action="append", metavar="SELECTOR", help=says)
    else:
        (wanted, *_) = get_args(kind) or (kind,)
        choices = CHOICES.get(field.name)
        metavar = None if choices else METAVARS.get(field.name, METAVARS[wanted])
        parser.add_argument(flag, type=wanted, choices=choices, metavar=metavar, help=says)
