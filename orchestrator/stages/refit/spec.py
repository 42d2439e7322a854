"""The stage that fits left factors again, to the inputs of the compressed model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.base import MethodTraits, Stage

if TYPE_CHECKING:
    from orchestrator.forecast.stage_cost import Setting, StageCost
    from orchestrator.stages.context.stage_job import StageJob
    from orchestrator.stages.context.values import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit(Stage):
    """Fit left factors again, if the method asks for it at this size."""

    name: ClassVar[str] = "refit"
    tables: ClassVar[Mapping[str, type]] = {}

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        return cls() if method.refits else None

    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        from orchestrator.stages.refit.job import RefitJob

        return RefitJob(planned)

    def cost(self, setting: "Setting") -> "StageCost":
        from orchestrator.stages.refit.cost import RefitCost

        return RefitCost(setting)
