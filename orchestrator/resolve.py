"""Resolution of a recipe: its method, allocator and stages with their options.

Settings that exclude each other are refused here; no file is read but a table of times.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from orchestrator.allocate import ALLOCATORS, make_allocator
from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.budget import Budget
from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.errors import UsageError
from orchestrator.methods import METHODS, make_method
from orchestrator.methods.base import Method
from orchestrator.plan.allowed_ranks import Multiple
from orchestrator.plan.cost import (
    CACHE,
    OPERATIONS,
    VALUES,
    CacheCost,
    Cost,
    OperationCost,
    TimeCost,
)
from orchestrator.plan.forms import FORMS, stored_as
from orchestrator.plan.latency_table import LatencyTable, read_latency_table
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import option_names
from orchestrator.recipe.recipe import Recipe
from orchestrator.stage_names import CALIBRATE, LEARN, SCORE, WRITE
from orchestrator.stages import option_tables, stage_classes
from orchestrator.stages.base import MethodTraits, Stage, stages_of

POLARISED_SIZES = ("keep_flops", "keep_latency", "keep_cache")
"""Sizes that gates are not polarised at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRecipe:
    """Method, allocator and stages of a recipe with their options, and its budget."""

    recipe: Recipe
    """With a method and a storage, and the allocation that the method implies, if none was
    named."""
    method: Method
    allocator: Allocator
    budget: Budget
    latency_table: LatencyTable | None
    """Measured times of linears, for the budget or for the forecast of its speed."""
    stages: tuple[Stage, ...]
    """The stages after the plan that apply, in order."""

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages of the run that have units or forecasts, in order."""
        scores = scoring_stage(self.allocator)
        return (CALIBRATE, *filter(None, [scores]), *(stage.name for stage in self.stages), WRITE)


def scoring_stage(allocator: Allocator) -> str:
    """Return the name of the stage that measures for an allocator; empty if it asks for none."""
    if allocator.scoring is Scoring.NONE:
        return ""
    return LEARN if allocator.scoring is Scoring.GATES else SCORE


def resolve(asked: Recipe, *, inherited: Collection[tuple[str, str]] = ()) -> ResolvedRecipe:
    """Resolve the names in a recipe; no file is read but its table of times.

    Args:
        inherited: Tables and names of options that were not given for this recipe, but come from an
            earlier one; those that have no effect are left out.

    Raises:
        UsageError: A name or an option does not exist, has no effect or has a value that is not
            allowed, or two settings exclude each other.
        InputError: The table of times cannot be read.
    """
    resolved = _resolve(asked)
    unused = _unused(resolved)
    refused = {
        table: given
        for table, options in unused.items()
        if (given := [each for each in options if (table, each) not in inherited])
    }
    if refused:
        raise UsageError(_without_effect(resolved, refused))
    return replace(resolved, recipe=without_options(resolved.recipe, unused))


def check_targets(linears: Sequence[Linear], resolved: ResolvedRecipe) -> None:
    """Check that a recipe can compress the targeted linears.

    Raises:
        UsageError: Its size or its allocation is about keys and values, of which there are none, or
            not only; or there are linears of a vision tower that it cannot compress.
    """
    allocator, cost = resolved.allocator, resolved.budget.cost
    if cost is CACHE and not any(each.is_cached for each in linears):
        raise UsageError(
            f"{cost.field}: none of {len(linears)} targeted linears is a k_proj or v_proj, whose "
            "outputs are cached; target those, or give keep"
        )
    other = next((each.name for each in linears if not each.is_cached), None)
    if allocator.is_for_cache and cost is not CACHE and other is not None:
        raise UsageError(
            f"allocation {resolved.recipe.allocation} divides keys and values, and {other} is "
            "targeted; give --target '*.k_proj,*.v_proj'"
        )
    _check_towers(linears, resolved)


def _check_towers(linears: Sequence[Linear], resolved: ResolvedRecipe) -> None:
    """Check that a recipe can compress those of the targeted linears that are in a vision tower.

    Only forward passes of the first shard run a tower: there are no gradients in it, no residual
    cosines, and no loss of the compressed one.

    Raises:
        UsageError: The method, the allocation or a stage needs more.
    """
    tower = next((each.tower for each in linears if each.tower), None)
    if tower is None:
        return
    method, allocator = resolved.method, resolved.allocator
    refusals = {
        f"method {method.name}, which needs gradients": method.label_draws > 0,
        f"method {method.name} with shared bases": method.grouping.size > 1,
        f"allocation {resolved.recipe.allocation}, which needs residual cosines": (
            allocator.needs_cosines or allocator.needs_block_cosines
        ),
        f"allocation {resolved.recipe.allocation}, which needs losses of the model": (
            allocator.scoring is not Scoring.NONE
        ),
        **{f"stage {each.name}": not each.takes_towers for each in resolved.stages},
    }
    refused = [what for what, is_refused in refusals.items() if is_refused]
    if refused:
        raise UsageError(
            f"target: linears of {tower} cannot be compressed by {refused[0]}; give --method "
            "svd-llm without further stages, or leave the tower out of --target"
        )


def unused_options(asked: Recipe) -> dict[str, tuple[str, ...]]:
    """Options of a recipe, by their tables, that no part of it takes.

    Raises:
        UsageError: As `resolve`, except for such an option.
    """
    return _unused(_resolve(asked))


def without_options(recipe: Recipe, unused: Mapping[str, Collection[str]]) -> Recipe:
    """Return the recipe without these options, by their tables; a table left empty goes too."""
    if not unused:
        return recipe
    kept = {
        table: {o: v for o, v in options.items() if o not in unused.get(table, ())}
        for table, options in recipe.options.items()
    }
    return replace(recipe, options={t: o for t, o in kept.items() if o or t not in unused})


def _resolve(asked: Recipe) -> ResolvedRecipe:
    asked.check_names(methods=METHODS, allocations=ALLOCATORS, tables=option_tables())
    recipe = asked.named()
    assert recipe.method is not None
    options, _ = split_options(recipe, recipe.method)
    method = make_method(recipe.method, options)
    recipe = replace(recipe, allocation=recipe.allocation or method.allocation)
    assert recipe.allocation is not None
    assert recipe.storage is not None
    _, options = split_options(recipe, recipe.allocation)
    allocator = make_allocator(recipe.allocation, options, method.form)
    _check_measures(recipe, method)
    _check_drop(recipe, method, allocator)
    _check_held_out(recipe, allocator)
    _check_gates(recipe, method, allocator)
    if isinstance(recipe.expert_groups, int) and not method.takes_experts_apart:
        raise UsageError(
            f"expert_groups is {recipe.expert_groups}, but {method.name} takes all experts of a "
            "block together; leave it out"
        )
    multiple = _rank_multiple(recipe, method)
    traits = MethodTraits(
        name=method.name,
        form=method.form,
        grouping=method.grouping,
        refits=method.refits(recipe.requested),
    )
    stages = stage_classes(recipe)
    for stage in stages:
        stage.check(recipe, traits)
    form, in_bytes = stored_as(method.form, recipe.storage), recipe.keep_bytes is not None
    table = None if recipe.latency_table is None else read_latency_table(recipe.latency_table)
    cost = _cost(recipe, method, multiple, table)
    return ResolvedRecipe(
        recipe=recipe,
        method=method,
        allocator=allocator,
        budget=Budget(recipe.requested, form, in_bytes=in_bytes, multiple=multiple, cost=cost),
        latency_table=table,
        stages=stages_of(stages, recipe, traits),
    )


def estimates_errors(method: str | None, *, in_order: bool = False) -> bool:
    """Test if a method is known and the errors of linears in its reports are estimates.

    Args:
        in_order: True if directions are kept in a learned order.
    """
    if method is None or method not in METHODS:
        return False
    kind = METHODS[method].kind
    return not (kind.has_exact_errors and (kind.has_additive_errors or not in_order))


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


def _check_drop(recipe: Recipe, method: Method, allocator: Allocator) -> None:
    """Raises UsageError where experts cannot be dropped one by one, or where that saves nothing."""
    asked = f"{recipe.allocation}: drop is {allocator.drop!r}"
    if allocator.drop != "no" and method.grouping.experts:
        raise UsageError(
            f"{asked}, and {method.name} gives the experts of a block one basis; leave drop out, "
            "or give method two-sided"
        )
    if allocator.drop == "reroute" and recipe.size_field in (OperationCost.field, TimeCost.field):
        raise UsageError(
            f"{asked} and {recipe.size_field} is given: a token that is routed again takes as many "
            "experts, so that dropped ones save no operations; give drop 'zero', or keep"
        )


def _check_held_out(recipe: Recipe, allocator: Allocator) -> None:
    """Raises UsageError if plans are to be compared without a text, or on that of the
    calibration."""
    if allocator.scoring is not Scoring.PLANS:
        return
    name, text = recipe.allocation, getattr(allocator, "text", "")
    if not text:
        raise UsageError(
            f"{name}: text is empty, and plans are compared on held-out text; give "
            f"--option {name}.text=FILE"
        )
    if text == recipe.calibration:
        raise UsageError(
            f"{name}: text {text} is the calibration text, which favours plans that fit it alone; "
            "give held-out text"
        )


def _check_gates(recipe: Recipe, method: Method, allocator: Allocator) -> None:
    """Raises UsageError for gates of directions that several linears share, or that are polarised
    at a size of another kind, or whose curves are in another unit than nats; or for one sample."""
    if not isinstance(allocator, GateAllocator):
        return
    if recipe.samples == 1:
        raise UsageError(
            f"samples is 1, and {recipe.allocation} learns on some sequences and measures its loss "
            "on others; give 2 or more"
        )
    given = [name for name in POLARISED_SIZES if getattr(recipe, name) is not None]
    if allocator.gates == "thresholds" and not method.nats:
        raise UsageError(
            f"allocation is {recipe.allocation!r}, which needs curves in nats, and those of "
            f"{method.name} are not; give method two-sided, or allocation learned"
        )
    if given and (allocator.gates == "polarised" or allocator.snapshot_gains):
        raise UsageError(
            f"{given[0]} is {getattr(recipe, given[0])}, but {recipe.allocation} drives gates to a "
            "fraction of the values; give keep or keep_bytes"
        )
    if method.grouping.experts or method.grouping.size > 1:
        raise UsageError(
            f"allocation is {recipe.allocation!r}, whose gates are those of one linear each, and "
            f"{method.name} gives several linears one basis; give method two-sided, or group 1"
        )


def _rank_multiple(recipe: Recipe, method: Method) -> Multiple:
    """Return the number of which ranks are multiples; 1 where a cut is no rank.

    Raises:
        UsageError: A number above 1 is given for a method that keeps entries.
    """
    asked, divided = recipe.rank_multiple or 1, FORMS[method.form].divided
    if divided == "ranks":
        return "auto" if asked == "auto" else int(asked)
    if asked not in (1, "auto"):
        raise UsageError(
            f"rank_multiple is {asked}, and {method.name} keeps {divided}, no ranks alone; give 1, "
            "or leave it out"
        )
    return 1


def _cost(recipe: Recipe, method: Method, multiple: Multiple, table: LatencyTable | None) -> Cost:
    """Return the cost that the size of the recipe is a fraction of.

    Raises:
        UsageError: Of operations, time or cache, for a method that keeps entries or experts; of
            time, for ranks that are no multiples.
    """
    if recipe.size_field not in (OperationCost.field, TimeCost.field, CacheCost.field):
        return VALUES
    if (divided := FORMS[method.form].divided) != "ranks":
        reason = "and a sparse weight is multiplied as a dense one, which saves no operations"
        if recipe.size_field == CacheCost.field:
            reason = "and a cache stores latents of factors alone"
        elif divided in ("experts", "clusters"):
            reason = "and a token takes as many experts as before, which saves no operations"
        raise UsageError(
            f"{recipe.size_field}: {method.name} keeps {divided}, {reason}; give keep, or a method "
            "of low rank"
        )
    if recipe.size_field == CacheCost.field:
        return CACHE
    if table is None or recipe.size_field == OperationCost.field:
        return OPERATIONS
    if multiple == 1:
        raise UsageError(
            "keep_latency: a latency_table has the times of multiples, and other ranks are slower; "
            "give rank_multiple auto"
        )
    return TimeCost(table)


def _unused(resolved: ResolvedRecipe) -> dict[str, tuple[str, ...]]:
    """Options of the tables that neither method nor allocator nor a stage takes."""
    recipe = resolved.recipe
    found: dict[str, tuple[str, ...]] = {}
    of_stages = {table for stage in resolved.stages for table in stage.used_tables}
    for table, options in recipe.options.items():
        of_method, of_allocator = split_options(recipe, table)
        used = {*(of_method if table == recipe.method else ())}
        used |= {*(of_allocator if table == recipe.allocation else ())}
        if table not in of_stages and (unused := tuple(o for o in options if o not in used)):
            found[table] = unused
    return found


def _without_effect(resolved: ResolvedRecipe, unused: Mapping[str, Collection[str]]) -> str:
    """Message about the first option without effect: what the recipe has, and options of that."""
    table, (option, *_) = next(iter(unused.items()))
    recipe, stages = resolved.recipe, ", ".join(stage.name for stage in resolved.stages)
    owners = [each for each in (METHODS.get(table), ALLOCATORS.get(table)) if each is not None]
    known = [name for owner in owners for name in option_names(owner)]
    said = f"; {table} has {', '.join(known) or 'no options'}" if owners else ""
    taken = ", ".join(dict.fromkeys(_options_of(resolved))) or "none"
    return (
        f"option {table}.{option} has no effect{said}; this recipe has method {recipe.method}, "
        f"allocation {recipe.allocation} and {f'stages {stages}' if stages else 'no later stage'}, "
        f"whose options are: {taken}; leave it out, or ask for what takes it"
    )


def _options_of(resolved: ResolvedRecipe) -> Iterator[str]:
    """Options that have an effect, `svd-llm.refit`."""
    recipe = resolved.recipe
    assert recipe.method is not None
    assert recipe.allocation is not None
    owners: list[tuple[str, Any]] = [(recipe.method, resolved.method)]
    owners.append((recipe.allocation, resolved.allocator))
    for stage in resolved.stages:
        tables = stage.option_tables()
        owners += [(table, tables[table]) for table in stage.used_tables]
    for table, owner in owners:
        # a field without a default is set by the recipe itself
        named = [field.name for field in fields(owner) if field.default is not MISSING]
        yield from (f"{table}.{option}" for option in named)
