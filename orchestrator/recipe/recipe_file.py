"""Fields of a recipe from a file of TOML, and their precedence."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import NEVER_OPTIONS, SIZE_FIELDS, check_field_names
from orchestrator.recipe.values import written_name

HEADINGS = ("compress", "plan", "search", "recipe", "orchestrator")
"""Names of tables in which the fields of a recipe are sometimes written by mistake."""


def override(written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fields, of which the given ones take precedence.

    A given size replaces any size, and with one in time its table, unless it is in time too.
    """
    sizes = {*SIZE_FIELDS} & given.keys()
    dropped = {*SIZE_FIELDS} if sizes else set()
    if sizes and "keep_latency" in written and "keep_latency" not in sizes:
        dropped.add("latency_table")
    return {name: v for name, v in written.items() if name not in dropped} | dict(given)


def read_recipe_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a recipe file; names are checked, values are not.

    Raises:
        UsageError: The file cannot be read, is not TOML, or sets a field that does not exist.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}") from error
    # also for endless numbers and deeply nested arrays
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    _check_no_table_of_fields(path, values)
    plain = {name for name, value in values.items() if not isinstance(value, dict)}
    check_field_names(str(path), plain - {"preset"})
    return values


def _check_no_table_of_fields(path: Path, values: Mapping[str, Any]) -> None:
    """Raise UsageError for a table such as [compress] around the fields of the recipe."""
    for name, table in values.items():
        if isinstance(table, dict) and (name in HEADINGS or {*table} & {*NEVER_OPTIONS}):
            raise UsageError(
                f"{path}: fields are in a table [{written_name(name)}]; write them at the top of "
                "the file, before any table: tables, such as [mgaa], are for options of a method, "
                "an allocation or a stage"
            )
