"""Resolution of a recipe: its method, allocator and stages with their options.

Settings that exclude each other are refused here; no file is read.
"""

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.allocate import ALLOCATORS, make_allocator
from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget
from orchestrator.errors import UsageError
from orchestrator.methods import METHODS, make_method
from orchestrator.methods.base import Method
from orchestrator.plan.forms import FORMS, stored_as
from orchestrator.recipe.options import option_names
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages import option_tables, stage_classes
from orchestrator.stages.base import MethodTraits, Stage, stages_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRecipe:
    """Method, allocator and stages of a recipe with their options, and its budget."""

    recipe: Recipe
    """With the allocation that the method implies, if none was named."""
    method: Method
    allocator: Allocator
    budget: Budget
    stages: tuple[Stage, ...]
    """The stages after the plan that apply, in order."""


def resolve(asked: Recipe) -> ResolvedRecipe:
    """Resolve the names in a recipe; no file is read.

    Raises:
        UsageError: A name or an option does not exist, has no effect or has a value that is not
            allowed, or two settings exclude each other.
    """
    asked.check_names(methods=METHODS, allocations=ALLOCATORS, tables=option_tables())
    options, _ = split_options(asked, asked.method)
    method = make_method(asked.method, options)
    recipe = replace(asked, allocation=asked.allocation or method.allocation)
    assert recipe.allocation is not None
    _, options = split_options(recipe, recipe.allocation)
    allocator = make_allocator(recipe.allocation, options, method.form)
    _check_measures(recipe, method)
    traits = MethodTraits(
        name=method.name,
        form=method.form,
        grouping=method.grouping,
        refits=method.refits(recipe.share),
    )
    stages = stage_classes(recipe)
    for stage in stages:
        stage.check(recipe, traits)
    form, in_bytes = stored_as(method.form, recipe.storage), recipe.keep_bytes is not None
    return ResolvedRecipe(
        recipe=recipe,
        method=method,
        allocator=allocator,
        budget=Budget(recipe.share, form, in_bytes=in_bytes),
        stages=stages_of(stages, recipe, traits),
    )


def split_options(recipe: Recipe, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a table into the options of the method and of the allocation of this name.

    An unknown option is given to the allocation, if one has this name, which refuses it.
    """
    table = recipe.options.get(name, {})
    own = option_names(METHODS[name]) if name in METHODS else []
    of_method = {o: v for o, v in table.items() if o in own or name not in ALLOCATORS}
    return of_method, {o: v for o, v in table.items() if o not in of_method}


def _check_measures(recipe: Recipe, method: Method) -> None:
    """Raises UsageError unless a method whose measurements fit no other allocation has its own."""
    divided = FORMS[method.form].divided
    if divided not in ("ranks", "entries") and recipe.allocation != method.allocation:
        raise UsageError(
            f"allocation is {recipe.allocation!r}, and {method.name} measures {divided} for "
            f"{method.allocation!r}; give that, or leave allocation out"
        )
