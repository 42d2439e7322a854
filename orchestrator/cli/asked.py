"""Parsed arguments as values: the recipe, the writer of its events, and their trackers."""

import argparse
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from orchestrator.cli.flags import FIELDS
from orchestrator.cli.lines import JsonLines, Lines
from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import Recipe, make_recipe, override, read_recipe_fields
from orchestrator.recipe.values import parse_option
from orchestrator.tracking.follow import Following, following


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Make the recipe from a file and the flags; flags take precedence."""
    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    written = read_recipe_fields(options.recipe) if "recipe" in options else {}
    for text in vars(options).get("option", ()):
        name, option, value = parse_option(text)
        table = written.get(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"option {text}: {name} is a field of the recipe, not a table")
        written[name] = {**table, option: value}
    preset = {"preset": options.preset} if "preset" in options else {}
    return make_recipe({**override(written, given), **preset})


def progress_of(options: argparse.Namespace) -> Lines | JsonLines:
    return JsonLines(sys.stderr) if options.progress == "json" else Lines(sys.stderr)


def followed(
    options: argparse.Namespace, directory: str, settings: Mapping[str, Any]
) -> AbstractContextManager[Following]:
    """Context in which events are written as lines and passed to the trackers that were given."""
    names = vars(options).get("track", ())
    return following(names, directory, settings, progress_of(options))
