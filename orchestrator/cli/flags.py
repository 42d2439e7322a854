"""Flags that several verbs share: fields, a recipe, progress and output."""

import argparse
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, cast, get_args

from orchestrator.evaluation import EvaluationRequest
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.field import about, described
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import Recipe
from orchestrator.recipe.values import fraction, parse_value
from orchestrator.tracking.follow import TRACKERS

METAVARS: dict[Any, str] = {int: "N", float: "FRACTION", str: "NAME"}
"""Names of values in the help, by type; `About.metavar` takes precedence."""
FIELDS = described(Recipe)
EVALUATION_FIELDS = described(EvaluationRequest)
EXECUTION_FIELDS = described(Execution)
REQUIRED = tuple(name for name, field in FIELDS.items() if field.default is MISSING)
"""Fields of a recipe that are positional arguments."""


def add_verb(commands: Any, name: str, says: str) -> argparse.ArgumentParser:
    """Add a parser whose result omits flags that were not given: defaults are defined in one
    place."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=says, description=says, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--verbose", action="store_true", help="print the traceback of an error")
    parser.set_defaults(command=name, verbose=False, json=False)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a recipe, of progress and of output."""
    for name in REQUIRED:
        says = about(FIELDS[name]).help
        parser.add_argument(name, metavar=name.upper(), nargs="?", help=says)
    add_recipe_flags(parser)
    add_progress(parser)
    add_json(parser, "print the whole report")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of a recipe, from a file or as flags."""
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        type=Path,
        help="TOML with these flags as keys; flags take precedence",
    )
    for name, field in FIELDS.items():
        if name not in REQUIRED:
            add_field(parser, field)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="named recipe; other flags take precedence. fast: the best closed form; best: "
        "the same, then trained",
    )
    add_option(parser)


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        metavar="NAME.OPTION=VALUE",
        help="option of a method, an allocator or a stage, such as mgaa.t=0.5; may be repeated",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the fields on which the speed of a machine depends."""
    for name in ("dtype", "threads"):
        add_field(parser, FIELDS[name], shows_default=False)


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("auto", "live", "lines", "json"),
        default="auto",
        help="format of events on stderr; auto: live on a terminal, else lines (default: auto)",
    )


def add_tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track",
        action="append",
        choices=TRACKERS,
        help="experiment tracker that follows the run, an extra of the package; may be repeated",
    )


def add_json(parser: argparse.ArgumentParser, says: str) -> None:
    parser.add_argument("--json", action="store_true", help=says)


def add_field(
    parser: argparse.ArgumentParser,
    field: Field[Any],
    *,
    flag: str | None = None,
    shows_default: bool = True,
    is_required: bool = False,
) -> None:
    """Add the flag of a described field, by default of the field's name.

    `is_required` is for a field that has a default and that the verb needs.
    """
    means, kind = about(field), cast(Any, field.type)
    says, choices = means.help, means.choices or None
    if shows_default and isinstance(field.default, str | int) and kind is not bool:
        says += f" (default: {field.default})"
    says = says.replace("%", "%%")
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
        needed = is_required or field.default is MISSING
        parser.add_argument(
            name, type=wanted, choices=choices, metavar=metavar, help=says, required=needed
        )
