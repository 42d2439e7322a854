"""Places of the output and of the run directory of a recipe, found without torch or a file."""

from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import Recipe
from orchestrator.store.places import Place, check_outside, parse_place


def places_of(recipe: Recipe, model: Place | None) -> tuple[Place, Place]:
    """Return the output and the run directory.

    Each directory is written or removed as a whole, so none may lie in another.

    Args:
        model: None for a model that is not on disk yet.

    Raises:
        UsageError: One lies in another or in the model, or the output is a root.
    """
    out = parse_place(recipe.out).expanduser().absolute()
    if out == out.parent:
        raise UsageError(f"out: {out} is a root; give a directory that is new or empty")
    beside = out.with_name(f"{out.name}.run")
    root = parse_place(recipe.run_dir).expanduser().absolute() if recipe.run_dir else beside
    if model is not None:
        check_outside("out", out, "the model", model)
        check_outside("run_dir", root, "the model", model)
    check_outside("out", out, "the run directory", root)
    check_outside("run_dir", root, "the output", out)
    return out, root
