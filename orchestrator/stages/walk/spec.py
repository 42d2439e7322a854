"""Stages that process blocks in order: compensation, training, and a second training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.errors import UsageError
from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.options import check_known
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.base import MethodTraits, Stage
from orchestrator.stages.context.refinement import TABLE, check_refinement, refinement_options

if TYPE_CHECKING:
    from orchestrator.forecast.stage_cost import Setting, StageCost
    from orchestrator.stages.context.stage_job import StageJob
    from orchestrator.stages.context.values import Planned

COMPENSATION = "compensation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk(Stage):
    """Compensate or train the blocks in order, each on the outputs of the compressed ones."""

    name: ClassVar[str] = "walk"
    tables: ClassVar[Mapping[str, type]] = {
        COMPENSATION: CompensationOptions,
        TABLE: RefineOptions,
    }
    compensation: CompensationOptions | None
    """None if factors are not fitted again."""
    refinement: RefineOptions | None
    """None if blocks are not trained."""

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        compensation = compensation_options(recipe)
        in_order = recipe.refine == "in_order"
        if compensation is None and not in_order:
            return None
        refinement = refinement_options(recipe) if in_order else None
        return cls(compensation=compensation, refinement=refinement)

    @property
    def used_tables(self) -> Collection[str]:
        found = {COMPENSATION: self.compensation, TABLE: self.refinement}
        return [table for table, options in found.items() if options is not None]

    @classmethod
    def check(cls, recipe: Recipe, method: MethodTraits) -> None:
        """Raises UsageError also if the recipe compensates and the factors cannot follow."""
        check_refinement(recipe, method)
        _check_compensation(recipe, method)

    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        from orchestrator.stages.walk.job import WalkJob

        return WalkJob(planned, earlier, self.compensation, self.refinement, name=self.name)

    def cost(self, setting: "Setting") -> "StageCost":
        from orchestrator.stages.walk.cost import WalkCost

        recipe = setting.recipe
        refines = recipe.refine in ("in_order", "swept")
        return WalkCost(setting, refinement_options(recipe), name=self.name, refines=refines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(Stage):
    """Train refined blocks once more, in order, on the outputs of the compressed ones."""

    name: ClassVar[str] = "sweep"
    tables: ClassVar[Mapping[str, type]] = {TABLE: RefineOptions}
    refinement: RefineOptions

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        return cls(refinement=refinement_options(recipe)) if recipe.refine == "swept" else None

    @classmethod
    def check(cls, recipe: Recipe, method: MethodTraits) -> None:
        check_refinement(recipe, method)

    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        from orchestrator.stages.walk.job import WalkJob

        return WalkJob(planned, earlier, None, self.refinement, name=self.name)

    def cost(self, setting: "Setting") -> "StageCost":
        from orchestrator.stages.walk.cost import WalkCost

        return WalkCost(setting, self.refinement, name=self.name, refines=True)


_KNOWN = [each.name for each in fields(CompensationOptions) if each.name != "objective"]


def compensation_options(recipe: Recipe) -> CompensationOptions | None:
    """The options with their objective; None if the recipe does not compensate.

    Raises:
        UsageError: An option does not exist or is not allowed.
    """
    table = recipe.options.get(COMPENSATION, {})
    check_known(COMPENSATION, table, _KNOWN)
    if recipe.compensate == "none":
        return None
    return CompensationOptions(objective=recipe.compensate, **table)


def _check_compensation(recipe: Recipe, method: MethodTraits) -> None:
    """Raises UsageError unless each linear has factors of its own that can be fitted."""
    table = recipe.options.get(COMPENSATION, {})
    check_known(COMPENSATION, table, _KNOWN)
    if recipe.compensate == "none":
        return
    asked = f"compensate is {recipe.compensate!r}"
    if method.refits:
        raise UsageError(
            f"{asked} and {method.name}'s refit is on; both fit factors to the compressed model's "
            "inputs, so give refit 'never' or compensate 'none'"
        )
    form = FORMS[method.form]
    if not form.has_rank:
        kept = "entries" if form.has_nonzeros else f"the form {form.name}"
        raise UsageError(
            f"{asked}, which fits factors; {method.name} keeps {kept} alone; give compensate "
            "'none', or refine 'in_order', which trains them"
        )
    if form.has_bias:
        raise UsageError(
            f"{asked}, which fits factors, and the bias of {method.name} would stay that of the "
            "factors before; give compensate 'none', or refine 'in_order', which trains both"
        )
    if method.grouping.size > 1:
        raise UsageError(
            f"{asked} and {method.name}'s group is {method.grouping.size}; a basis that blocks "
            "share cannot follow the inputs of each; give group 1 or compensate 'none'"
        )
    if method.grouping.is_shared:
        raise UsageError(
            f"{asked} and {method.name} shares bases among experts, which cannot follow the inputs "
            "of each; give compensate 'none', or another method"
        )
    if "beta" in table and recipe.compensate != "blend":
        raise UsageError(f"{asked} and beta is given, which is for 'blend'; leave one of them out")
    compensation_options(recipe)
