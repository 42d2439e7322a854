"""The stage that trains all blocks in parallel, each towards its dense outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.base import MethodTraits, Stage
from orchestrator.stages.context.refinement import TABLE, check_refinement, refinement_options

if TYPE_CHECKING:
    from orchestrator.forecast.stage_cost import Setting, StageCost
    from orchestrator.stages.context.stage_job import StageJob
    from orchestrator.stages.context.values import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine(Stage):
    """Train each block towards the outputs of its dense block, all blocks in parallel."""

    name: ClassVar[str] = "refine"
    tables: ClassVar[Mapping[str, type]] = {TABLE: RefineOptions}
    options: RefineOptions

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        if recipe.refine not in ("blocks", "swept"):
            return None
        return cls(options=refinement_options(recipe))

    @classmethod
    def check(cls, recipe: Recipe, method: MethodTraits) -> None:
        check_refinement(recipe, method)

    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        from orchestrator.stages.refine.job import RefineJob

        return RefineJob(planned, earlier, self.options)

    def cost(self, setting: "Setting") -> "StageCost":
        from orchestrator.stages.refine.cost import RefineCost

        return RefineCost(setting, self.options)
