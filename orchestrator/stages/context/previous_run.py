"""Another size from what a run has stored: its recipe, its model and its tokens, asked for again.

Units are named by what they are computed from, and the size is no part of that, so another size
finds statistics and decompositions done. What a method does for one size alone (masks, refits,
compensation, training) is done for the new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.recipe.recipe import SCHEDULE, Recipe, make_recipe
from orchestrator.store.places import Place, parse_place
from orchestrator.store.run import RunDirectory

SIZES = {"keep", "keep_bytes"}


@dataclass(frozen=True, slots=True)
class PreviousRun:
    """What a run knew that its recipe does not say."""

    model: Place
    """Where the model was found."""
    base_model: str
    """What the result calls it."""
    tokens_key: str
    """The unit of the calibration's tokens; the text itself is not read again."""
    tokens: Mapping[str, Any]
    """The facts of that unit."""


def asked_before(run_dir: str, out: str, **given: Any) -> tuple[Recipe, PreviousRun]:
    """The recipe that a run directory was last used for, with another output and other fields.

    Where and how fast it is performed is said anew; only the number of threads, which decides
    bits, stays.

    Args:
        given: Fields of the recipe; `keep` or `keep_bytes` stands for either of them.

    Raises:
        InputError: There is no run here, it did not come so far as to read its text, or what it
            left is damaged.
        UsageError: A field has a value that is not allowed.
    """
    run = RunDirectory(parse_place(run_dir).expanduser().absolute())
    said = run.description()
    written, model, base_model, key = (
        said.get(name) for name in ("recipe", "model", "base_model", "tokens_key")
    )
    names = (model, base_model, key)
    if not isinstance(written, dict) or not all(isinstance(each, str) for each in names):
        raise InputError(
            f"{run_dir}: no compression has read its text here; give the whole command, with "
            f"--run-dir {run_dir}"
        )
    tokens = run.units.manifest(str(key)) if run.units.verify(str(key)) else None
    if tokens is None:
        raise InputError(
            f"{run_dir}: the tokens of its calibration are missing or damaged; give the whole "
            f"command with --run-dir {run_dir}, which reads the text again"
        )
    dropped = {*SCHEDULE, *(("keep", "keep_bytes") if SIZES & given.keys() else ())} - {"threads"}
    kept = {
        name: value for name, value in written.items() if value is not None and name not in dropped
    }
    recipe = make_recipe({**kept, **given, "out": out, "run_dir": run_dir})
    return recipe, PreviousRun(parse_place(str(model)), str(base_model), str(key), tokens["facts"])
