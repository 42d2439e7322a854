"""Parser of the command line: commands, flags and help texts."""

import argparse
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, cast, get_args

from orchestrator.evaluation import EvaluationRequest
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import about, described
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import SIZE_FIELDS, Recipe
from orchestrator.recipe.values import fraction, parse_value
from orchestrator.version import __version__

METAVARS: dict[Any, str] = {int: "N", float: "FRACTION", str: "NAME"}
"""Names of values in the help, by type; `About.metavar` takes precedence."""
FIELDS = described(Recipe)
EVALUATION_FIELDS = described(EvaluationRequest)
EXECUTION_FIELDS = described(Execution)
HELD_OUT = {"text": "text", "field": "text_field", "samples": "text_samples", "stride": "stride"}
"""Fields of an evaluation that `search` takes, with their flags there."""
REQUIRED = tuple(name for name, field in FIELDS.items() if field.default is MISSING)
"""Fields of a recipe that are positional arguments."""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; its result contains `command` and the given flags."""
    parser = argparse.ArgumentParser(
        prog="orchestrator",
        description="Compresses large language models on a Ray cluster.",
        epilog="Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or data invalid, "
        "75 stopped and resumable, 1 other.",
    )
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_methods(commands)
    _add_plan(commands)
    _add_measure(commands)
    _add_compress(commands)
    _add_retarget(commands)
    _add_search(commands)
    _add_evaluate(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_status(commands)
    _add_report(commands)
    _add_compare(commands)
    _add_clean(commands)
    _add_submit(commands)
    return parser


def _add_methods(commands: Any) -> None:
    parser = _command(
        commands, "methods", "list methods, allocators, stages and forms, with their options"
    )
    _add_json(parser, "print the list as JSON")


def _add_compress(commands: Any) -> None:
    parser = _command(commands, "compress", "compress a dense model")
    _add_recipe(parser)


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands, "plan", "forecast memory, time and cost of a compression, from config and headers"
    )
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or config.json")
    parser.add_argument(
        "--gpus", metavar="N", type=int, help="number of workers, one per GPU (default: 1)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="H100, A100-80GB, A10G, ... (default: H100)")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="such as 80GB (default: that of the GPU)"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="host memory per worker (default: not checked)"
    )
    parser.add_argument("--price", metavar="AMOUNT", type=float, help="price of a worker per hour")
    parser.add_argument(
        "--rates", metavar="FILE", help="file written by `measure`, instead of --gpu"
    )
    _add_recipe_flags(parser)
    _add_json(parser, "print the forecast as JSON")


def _add_measure(commands: Any) -> None:
    parser = _command(commands, "measure", "measure the speed of this machine, for plan --rates")
    parser.add_argument("output", metavar="FILE", help="JSON file to write")
    for name in ("dtype", "threads"):
        _add_field(parser, FIELDS[name], shows_default=False)


def _add_retarget(commands: Any) -> None:
    parser = _command(
        commands,
        "retarget",
        "make another size from the stored results of a run, without calibration or SVD",
    )
    parser.add_argument("run", metavar="RUN", help="run directory of a compression")
    parser.add_argument("out", metavar="OUT", help="directory of the result")
    for name in (*SIZE_FIELDS, "max_shard_size"):
        _add_field(parser, FIELDS[name])
    for field in EXECUTION_FIELDS.values():
        if field.name != "run_dir" and not about(field).decides_bits:
            _add_field(parser, field)
    _add_progress(parser)
    _add_json(parser, "print the whole report")


def _add_search(commands: Any) -> None:
    parser = _command(
        commands, "search", "compress with several settings, keep what held-out text likes"
    )
    _add_recipe(parser)
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="NAME=VALUE,...",
        help="values to try for a flag (storage=plain,pivoted) or an option (mgaa.t=0.5,1); "
        "may be repeated, every combination is tried",
    )
    for name, flag in HELD_OUT.items():
        _add_field(parser, EVALUATION_FIELDS[name], flag=flag)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a recipe, of progress and of output."""
    for name in REQUIRED:
        says = about(FIELDS[name]).help
        parser.add_argument(name, metavar=name.upper(), nargs="?", help=says)
    _add_recipe_flags(parser)
    _add_progress(parser)
    _add_json(parser, "print the whole report")


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a recipe, from a file or as flags."""
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        type=Path,
        help="TOML with these flags as keys; flags take precedence",
    )
    for name, field in FIELDS.items():
        if name not in REQUIRED:
            _add_field(parser, field)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="named recipe; other flags take precedence. fast: the best closed form; best: "
        "the same, then trained",
    )
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME.OPTION=VALUE",
        help="option of a method or an allocator, such as mgaa.t=0.5; may be repeated",
    )


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", "measure perplexity, agreement with the dense model, speed and size"
    )
    parser.add_argument("model", metavar="MODEL", help=about(EVALUATION_FIELDS["model"]).help)
    own = [name for name in EVALUATION_FIELDS if name not in {"model", *EXECUTION_FIELDS}]
    for name in (*own, *EXECUTION_FIELDS):
        _add_field(parser, EVALUATION_FIELDS[name])
    _add_progress(parser)
    _add_json(parser, "print the result as JSON")


def _add_verify(commands: Any) -> None:
    parser = _command(commands, "verify", "check a compressed checkpoint and list its problems")
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("--against", metavar="DENSE", help="dense model to compare with")
    parser.add_argument("--linears", metavar="N", type=int, help="number of linears to reconstruct")
    _add_json(parser, "print all results as JSON")


def _add_export(commands: Any) -> None:
    parser = _command(commands, "export", "convert a compressed checkpoint for other programs")
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("dense_dir", metavar="DENSE_DIR", help="directory to write")
    parser.add_argument(
        "--format", choices=("dense",), default="dense", help="dense: multiply the factors"
    )


def _add_status(commands: Any) -> None:
    parser = _command(commands, "status", "show the progress of a run, from its directory alone")
    parser.add_argument("run", metavar="RUN", help="run directory")
    _add_json(parser, "print the status as JSON")


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", "write an HTML page about a run")
    parser.add_argument("run", metavar="RUN", help="run directory, or a compressed checkpoint")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file of the page (default: RUN/report.html or OUT.report.html)",
    )


def _add_compare(commands: Any) -> None:
    parser = _command(commands, "compare", "write an HTML page that compares runs")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directories, or compressed checkpoints"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="file of the page (default: comparison.html)"
    )


def _add_clean(commands: Any) -> None:
    parser = _command(
        commands, "clean", "remove a run directory; files that others put there are left"
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="only list the files to be removed and those to be left",
    )


def _add_submit(commands: Any) -> None:
    parser = _command(commands, "submit", "run a command as a Ray job, with retries")
    parser.usage = "%(prog)s [options] -- COMMAND ..."
    parser.add_argument(
        "program", metavar="COMMAND", nargs="+", help="compress or another, with its arguments"
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="dashboard, http://HEAD:8265 (default: the one that Ray finds)",
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=int,
        help="attempts after the first, for errors other than those of the command (default: 3)",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="directory to upload with the job (default: .)"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="files not to upload, besides .venv, .work, .git and those in .gitignore; "
        "may be repeated",
    )
    parser.add_argument(
        "--env",
        action="append",
        metavar="NAME=VALUE",
        help="environment variable of the job; may be repeated",
    )
    parser.add_argument(
        "--no-wait",
        action="store_true",
        default=False,
        help="print the submission id and exit",
    )


def _command(commands: Any, name: str, says: str) -> argparse.ArgumentParser:
    """Add a parser whose result omits flags that were not given: defaults are defined in one
    place."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=says, description=says, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    parser.set_defaults(command=name, verbose=False, json=False)
    return parser


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress", choices=("lines", "json"), default="lines", help="format of events on stderr"
    )


def _add_json(parser: argparse.ArgumentParser, says: str) -> None:
    parser.add_argument("--json", action="store_true", help=says)


def _add_field(
    parser: argparse.ArgumentParser,
    field: Field[Any],
    *,
    flag: str | None = None,
    shows_default: bool = True,
) -> None:
    """Add the flag of a described field, by default of the field's name."""
    means, kind = about(field), cast(Any, field.type)
    says, choices = means.help, means.choices or None
    if shows_default and isinstance(field.default, str | int) and kind is not bool:
        says += f" (default: {field.default})"
    name = "--" + (flag or field.name).replace("_", "-")
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=says)
    elif kind == tuple[str, ...]:
        parser.add_argument(name, action="append", metavar=means.metavar, help=says)
    else:
        (wanted, *others) = get_args(kind) or (kind,)
        metavar = None if choices else means.metavar or METAVARS.get(wanted)
        if means.is_fraction:
            wanted = fraction
        elif wanted is not str and str in others:
            wanted = parse_value
        needed = field.default is MISSING
        parser.add_argument(
            name, type=wanted, choices=choices, metavar=metavar, help=says, required=needed
        )
