"""Parsed arguments as values: the recipe, the writer of its events, and their trackers."""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orchestrator.cli.flags import FIELDS
from orchestrator.cli.lines import JsonLines, Lines
from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import SIZE_FIELDS, Recipe, make_recipe
from orchestrator.recipe.recipe_file import override, read_recipe_fields
from orchestrator.recipe.values import parse_option
from orchestrator.tracking.follow import Following, following


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Make the recipe from a file and the flags; flags take precedence."""
    given = {name: value for name, value in vars(options).items() if name in FIELDS}
    for name in SIZE_FIELDS:
        if isinstance(given.get(name), tuple):
            raise UsageError(f"{options.command} takes one {name}, not several")
    written = read_recipe_fields(options.recipe) if "recipe" in options else {}
    written = with_options(options, written)
    preset = {"preset": options.preset} if "preset" in options else {}
    return make_recipe({**override(written, given), **preset})


def with_options(options: argparse.Namespace, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with the values of `--option`.

    Raises:
        UsageError: An option is not NAME.OPTION=VALUE, or its name is that of a field.
    """
    found = dict(tables)
    for text in vars(options).get("option", ()):
        name, option, value = parse_option(text)
        table = found.get(name, {})
        if name in FIELDS or not isinstance(table, dict):
            raise UsageError(f"option {text}: {name} is a field of the recipe, not a table")
        found[name] = {**table, option: value}
    return found


def sizes_of(options: argparse.Namespace) -> tuple[float, ...]:
    """Return the sizes if several are given; the option is set to the first one."""
    for name in SIZE_FIELDS:
        sizes = getattr(options, name, None)
        if isinstance(sizes, tuple):
            setattr(options, name, sizes[0])
            return sizes
    return ()


def progress_of(options: argparse.Namespace) -> Lines | JsonLines:
    """Return the writer of events to stderr; a context manager."""
    if options.progress == "json":
        return JsonLines(sys.stderr)
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if options.progress == "live" or (options.progress == "auto" and is_terminal):
        # rich takes a tenth of a second to import
        from orchestrator.cli.live import LiveDisplay

        return LiveDisplay(sys.stderr)
    return Lines(sys.stderr)


@contextmanager
def followed(
    options: argparse.Namespace, directory: str, settings: Mapping[str, Any]
) -> Iterator[Following]:
    """Context in which events are displayed and passed to the trackers that were given."""
    names = vars(options).get("track", ())
    with progress_of(options) as show, following(names, directory, settings, show) as trackers:
        yield trackers
