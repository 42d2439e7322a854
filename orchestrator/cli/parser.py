"""The words of the command line: commands, flags and what they say of themselves."""

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args

from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import CHOICES, Recipe
from orchestrator.recipe.values import fraction, parse_value
from orchestrator.version import __version__

HELP = {
    "keep": "values to keep of the targeted linears, above 0, at most 1; of several, 0.8,0.6, "
    "compress writes OUT-0.8 and OUT-0.6",
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
    "workers": "actors; one a GPU, or one a CPU where there are no GPUs, without it; 2..8 begins "
    "with 2, and an autoscaler is asked for up to 8",
    "threads": "of an actor; one without it",
    "shards": "contiguous cuts of the model; at most two blocks each without it",
    "run_dir": "run directory; OUT.run without it",
    "allow_mixed": "go on with stages left unfinished on another kind of device, with other "
    "threads or versions; they are made again without it",
    "allow_infeasible": "try what is forecast not to fit in memory",
}
METAVARS: dict[Any, str] = {int: "N", float: "FRACTION", str: "NAME"} | {
    "address": "ADDRESS",
    "calibration": "TEXT",
    "keep": "FRACTION",
    "keep_bytes": "FRACTION",
    "max_shard_size": "SIZE",
    "run_dir": "DIR",
    "workers": "N",
}
FIELDS = {field.name: field for field in fields(Recipe)}


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; its result names the `command` and holds what was given."""
    parser = argparse.ArgumentParser(
        prog="orchestrator",
        description="Compresses large language models on a Ray cluster.",
        epilog="Exit codes: 0 done, 2 usage, 3 infeasible, 4 model or data invalid, "
        "75 stopped and resumable, 1 other.",
    )
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
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


def _add_compress(commands: Any) -> None:
    parser = _command(commands, "compress", "make a smaller model out of a dense one")
    _add_recipe(parser)


def _add_plan(commands: Any) -> None:
    parser = _command(
        commands, "plan", "what a compression takes, from config and headers: memory, time, money"
    )
    parser.add_argument("model", metavar="MODEL", help="directory, hub id or a config.json")
    parser.add_argument("--gpus", metavar="N", type=int, help="workers, one a GPU (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="H100, A100-80GB, A10G, ... (default: H100)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="80GB; the GPU's own without it")
    parser.add_argument("--host-memory", metavar="SIZE", help="of a worker; not checked without it")
    parser.add_argument("--price", metavar="AMOUNT", type=float, help="of a worker for an hour")
    parser.add_argument(
        "--rates", metavar="FILE", help="what `measure` has written, in place of a named GPU"
    )
    _add_recipe_flags(parser)
    _add_json(parser, "print the forecast as JSON")


def _add_measure(commands: Any) -> None:
    parser = _command(commands, "measure", "how fast this machine is, for plan --rates")
    parser.add_argument("output", metavar="FILE", help="JSON file to write")
    for name in ("dtype", "threads"):
        _add_field(parser, FIELDS[name], shows_default=False)


def _add_retarget(commands: Any) -> None:
    parser = _command(
        commands, "retarget", "another size of what a run has stored, without calibration or SVD"
    )
    parser.add_argument("run", metavar="RUN", help="run directory of a compression")
    parser.add_argument("out", metavar="OUT", help="directory of the result")
    for name in ("keep", "keep_bytes", "max_shard_size"):
        _add_field(parser, FIELDS[name])
    for name in ("executor", "address", "workers", "shards", "allow_mixed"):
        _add_field(parser, FIELDS[name])
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
    _add_recipe_flags(parser)
    _add_progress(parser)
    _add_json(parser, "print the whole report")


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """A recipe's fields, from a file or one by one."""
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


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", "perplexity, agreement with the dense model, speed, size"
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
    for name in ("executor", "address", "workers", "threads", "shards", "allow_mixed"):
        _add_field(parser, FIELDS[name])
    parser.add_argument("--run-dir", metavar="DIR", help="run directory; MODEL.evaluation without")
    _add_progress(parser)
    _add_json(parser, "print the result as JSON")


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands, "verify", "read a compressed checkpoint again, and say what is wrong with it"
    )
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("--against", metavar="DENSE", help="dense model to compare with")
    parser.add_argument("--linears", metavar="N", type=int, help="how many are reconstructed")
    _add_json(parser, "print all that was found as JSON")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", "a compressed checkpoint in a form that other programs know"
    )
    parser.add_argument("out", metavar="OUT", help="compressed checkpoint")
    parser.add_argument("dense_dir", metavar="DENSE_DIR", help="directory to write")
    parser.add_argument(
        "--format", choices=("dense",), default="dense", help="dense: factors multiplied back"
    )


def _add_status(commands: Any) -> None:
    parser = _command(commands, "status", "where a run stands, from its directory alone")
    parser.add_argument("run", metavar="RUN", help="run directory")
    _add_json(parser, "print the status as JSON")


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", "one HTML page that shows a run")
    parser.add_argument("run", metavar="RUN", help="run directory, or a compressed checkpoint")
    parser.add_argument(
        "--output", metavar="FILE", help="the page; RUN/report.html or OUT.report.html without it"
    )


def _add_compare(commands: Any) -> None:
    parser = _command(commands, "compare", "one HTML page that puts runs side by side")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directories, or compressed checkpoints"
    )
    parser.add_argument("--output", metavar="FILE", help="the page; comparison.html without it")


def _add_clean(commands: Any) -> None:
    parser = _command(commands, "clean", "remove a run directory")
    parser.add_argument("run", metavar="RUN", help="run directory")


def _add_submit(commands: Any) -> None:
    parser = _command(commands, "submit", "run a command as a Ray job, again while that may help")
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


def _command(commands: Any, name: str, says: str) -> argparse.ArgumentParser:
    """A parser that leaves out of its result what was not given: defaults live in one place."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=says, description=says, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--verbose", action="store_true", help="errors with their traceback")
    parser.set_defaults(command=name, verbose=False, json=False)
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
    if shows_default and isinstance(field.default, str | int) and field.type is not bool:
        says += f" (default: {field.default})"
    flag = "--" + field.name.replace("_", "-")
    kind: Any = field.type
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=says)
    elif kind == tuple[str, ...]:
        parser.add_argument(flag, action="append", metavar="SELECTOR", help=says)
    else:
        (wanted, *others) = get_args(kind) or (kind,)
        if field.name in ("keep", "keep_bytes"):
            wanted = fraction
        elif str in others:
            wanted = parse_value
        choices = CHOICES.get(field.name)
        metavar = None if choices else METAVARS.get(field.name, METAVARS.get(wanted))
        parser.add_argument(flag, type=wanted, choices=choices, metavar=metavar, help=says)
