"""What the names in a recipe stand for, and whether they go together; nothing is read."""

from dataclasses import dataclass, fields, replace
from typing import Any

from orchestrator.allocate import ALLOCATION_NAMES, Allocator, make_allocator
from orchestrator.errors import UsageError
from orchestrator.methods import METHODS, make_method
from orchestrator.methods.base import Method
from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.recipe.options import check_known, option_names
from orchestrator.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Method, allocation and the options of the stages behind the plan."""

    recipe: Recipe
    """With the allocation that it means."""
    method: Method
    allocator: Allocator
    compensation: CompensationOptions | None
    refinement: RefineOptions
    training: TrainOptions


def resolve(asked: Recipe) -> Parts:
    """The parts that a recipe names.

    Raises:
        UsageError: A name or an option does not exist, has no effect or has a value that is not
            allowed, or two parts do not go together.
    """
    asked.check_names(methods=METHODS, allocations=ALLOCATION_NAMES)
    options, _ = split_options(asked, asked.method)
    method = make_method(asked.method, options)
    recipe = replace(asked, allocation=asked.allocation or method.allocation)
    assert recipe.allocation is not None
    _, options = split_options(recipe, recipe.allocation)
    allocator = make_allocator(recipe.allocation, options, method.form)
    _check_entries(recipe, method)
    _check_storage(recipe, method)
    return Parts(
        recipe=recipe,
        method=method,
        allocator=allocator,
        refinement=_refinement(recipe, method),
        compensation=_compensation(recipe, method),
        training=_training(recipe, method),
    )


def split_options(recipe: Recipe, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the method and those of the allocation of this name, which share a table.

    What is no option of the method is the allocation's, if there is one of this name, to refuse.
    """
    table = recipe.options.get(name, {})
    own = option_names(METHODS[name]) if name in METHODS else []
    of_method = {o: v for o, v in table.items() if o in own or name not in ALLOCATION_NAMES}
    return of_method, {o: v for o, v in table.items() if o not in of_method}


def _check_entries(recipe: Recipe, method: Method) -> None:
    """Raises UsageError where ranks and entries are not those of the allocation's method."""
    if method.form == "low_rank_sparse" and recipe.allocation != method.allocation:
        raise UsageError(
            f"allocation is {recipe.allocation!r}, and {method.name} measures ranks "
            f"and entries for {method.allocation!r}; give that, or leave allocation out"
        )


def _check_storage(recipe: Recipe, method: Method) -> None:
    """Raises UsageError where factors are to be pivoted and are none, or share a basis."""
    if recipe.storage != "pivoted":
        return
    if method.form != "low_rank":
        raise UsageError(
            f"storage is 'pivoted', which is for the factors of a low rank; {method.name} "
            "keeps entries; give storage 'plain'"
        )
    if method.grouping.size > 1:
        raise UsageError(
            f"storage is 'pivoted' and {method.name}'s group is {method.grouping.size}; "
            "pivots are rows of one linear, so none share a basis; give group 1"
        )


def _refinement(recipe: Recipe, method: Method) -> RefineOptions:
    table = recipe.options.get("refinement", {})
    check_known("refinement", table, option_names(RefineOptions))
    if "slices" in table and recipe.refine == "blocks":
        raise UsageError(
            "refine is 'blocks' and refinement: slices is given, which is for blocks that are "
            "lent, 'in_order' and 'swept'; leave it out"
        )
    if recipe.refine != "none" and method.refits(recipe.share):
        raise UsageError(
            f"refine is {recipe.refine!r} and {method.name}'s refit is on; training "
            "fits left factors too, so give refit 'never' or refine 'none'"
        )
    return RefineOptions(**table)


def _compensation(recipe: Recipe, method: Method) -> CompensationOptions | None:
    """How the recipe compensates, if it does; only factors of a linear's own can."""
    table = recipe.options.get("compensation", {})
    known = [each.name for each in fields(CompensationOptions) if each.name != "objective"]
    check_known("compensation", table, known)
    if recipe.compensate == "none":
        return None
    asked = f"compensate is {recipe.compensate!r}"
    if method.refits(recipe.share):
        raise UsageError(
            f"{asked} and {method.name}'s refit is on; both fit factors to the compressed model's "
            "inputs, so give refit 'never' or compensate 'none'"
        )
    if method.form == "sparse":
        raise UsageError(
            f"{asked}, which fits factors; {method.name} keeps entries alone; give compensate "
            "'none', or refine 'in_order', which trains them"
        )
    if method.grouping.size > 1:
        raise UsageError(
            f"{asked} and {method.name}'s group is {method.grouping.size}; a basis that blocks "
            "share cannot follow the inputs of each; give group 1 or compensate 'none'"
        )
    if "beta" in table and recipe.compensate != "blend":
        raise UsageError(f"{asked} and beta is given, which is for 'blend'; leave one of them out")
    return CompensationOptions(objective=recipe.compensate, **table)


def _training(recipe: Recipe, method: Method) -> TrainOptions:
    table = recipe.options.get("training", {})
    check_known("training", table, option_names(TrainOptions))
    if recipe.train != "none" and method.refits(recipe.share):
        raise UsageError(
            f"train is {recipe.train!r} and {method.name}'s refit is on; training fits left "
            "factors too, so give refit 'never' or train 'none'"
        )
    return TrainOptions(**table)
