"""Parsed arguments as values: the recipe, and the writer of its events."""

import argparse
import os
import sys

from orchestrator.cli.flags import FIELDS
from orchestrator.cli.lines import JsonLines, Lines
from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import Recipe, make_recipe, override, read_recipe_fields
from orchestrator.recipe.values import parse_option


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
    """Return the writer of events to stderr; a context manager."""
    if options.progress == "json":
        return JsonLines(sys.stderr)
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if options.progress == "live" or (options.progress == "auto" and is_terminal):
        # rich takes a tenth of a second to import
        from orchestrator.cli.live import LiveDisplay

        return LiveDisplay(sys.stderr)
    return Lines(sys.stderr)
