"""Options of the training of blocks, which several stages take: no torch."""

from orchestrator.errors import UsageError
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.recipe.options import check_known, option_names
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.base import MethodTraits

TABLE = "refinement"


def refinement_options(recipe: Recipe) -> RefineOptions:
    """Raises UsageError for an option that does not exist or is not allowed."""
    table = recipe.options.get(TABLE, {})
    check_known(TABLE, table, option_names(RefineOptions))
    return RefineOptions(**table)


def check_refinement(recipe: Recipe, method: MethodTraits) -> None:
    """Raises UsageError if the recipe's refinement has no effect or excludes another setting."""
    table = recipe.options.get(TABLE, {})
    check_known(TABLE, table, option_names(RefineOptions))
    if "slices" in table and recipe.refine == "blocks":
        raise UsageError(
            "refine is 'blocks' and refinement: slices is given, which is for blocks that workers "
            "replicate, 'in_order' and 'swept'; leave it out"
        )
    if recipe.refine != "none" and method.refits:
        raise UsageError(
            f"refine is {recipe.refine!r} and {method.name}'s refit is on; training "
            "fits left factors too, so give refit 'never' or refine 'none'"
        )
    refinement_options(recipe)
