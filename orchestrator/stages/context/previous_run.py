"""Another size from the units of a run: its recipe, its model and its tokens are used again.

The recipe is that of the last `compress`: what one `retarget` changes is not changed for the next.

Units are named by their inputs, which do not include the size, so for another size statistics and
decompositions exist already. Steps that depend on the size (masks, refits, compensation, training)
are performed for the new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.recipe.field import about, described
from orchestrator.recipe.recipe import SCHEDULE, Recipe, make_recipe
from orchestrator.recipe.recipe_file import override
from orchestrator.recipe.values import check_options
from orchestrator.store.places import Place, parse_place
from orchestrator.store.run import RunDirectory


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """Facts of a run that are not in its recipe."""

    model: Place
    """Place of the model."""
    base_model: str
    """Name of the model in the result."""
    tokens_key: str
    """Key of the unit of calibration tokens; the text itself is not read again."""
    tokens: Mapping[str, Any]
    """The facts of that unit."""
    recipe: Mapping[str, Any]
    """Recipe of the last `compress`."""
    inherited: frozenset[tuple[str, str]] = frozenset()
    """Tables and names of options that it has given; those without effect now are left out."""


def asked_before(run_dir: str, out: str, **given: Any) -> tuple[Recipe, PreviousRun]:
    """The recipe of the last `compress` of a run directory, with another output and other fields.

    Fields of execution take their defaults unless they are given; only the number of threads, which
    decides bits, stays.

    Args:
        given: Fields of the recipe; a size, such as `keep`, replaces that of the run, and `options`
            only the options that they name.

    Raises:
        InputError: The directory has no run, the run has not read its text, or its units are
            damaged.
        UsageError: A field has a value that is not allowed.
    """
    run = RunDirectory(parse_place(run_dir).expanduser().absolute())
    said = run.description()
    model, base_model, key = (said.get(name) for name in ("model", "base_model", "tokens_key"))
    # run directories of 0.1.0 have one recipe, the last one
    written = said.get("compressed", said.get("recipe"))
    names = (model, base_model, key)
    if not isinstance(written, dict) or not all(isinstance(each, str) for each in names):
        raise InputError(
            f"{run_dir}: no compression has read its text here; give the whole command, with "
            f"--run-dir {run_dir}"
        )
    known = described(Recipe)
    tokens = run.units.manifest(str(key)) if run.units.verify(str(key)) else None
    if tokens is None:
        raise InputError(
            f"{run_dir}: the tokens of its calibration are missing or damaged; give the whole "
            f"command with --run-dir {run_dir}, which reads the text again"
        )
    dropped = {name for name in SCHEDULE if not about(known[name]).decides_bits}
    kept = {
        name: value for name, value in written.items() if value is not None and name not in dropped
    }
    tables = given.pop("options", None) or {}
    check_options(tables)
    options = dict(kept.pop("options", {}))
    inherited = {(name, option) for name, table in options.items() for option in table}
    inherited -= {(name, option) for name, table in tables.items() for option in table}
    for name, table in tables.items():
        options[name] = {**options.get(name, {}), **table}
    fields = {**override(kept, given), "options": options, "out": out, "run_dir": run_dir}
    recipe = make_recipe(fields)
    return recipe, PreviousRun(
        model=parse_place(str(model)),
        base_model=str(base_model),
        tokens_key=str(key),
        tokens=tokens["facts"],
        recipe=written,
        inherited=frozenset(inherited),
    )
