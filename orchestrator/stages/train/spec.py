"""The stage that trains the whole compressed model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.errors import UsageError
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.options import check_known, option_names
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.base import MethodTraits, Stage

if TYPE_CHECKING:
    from orchestrator.forecast.stage_cost import Setting, StageCost
    from orchestrator.stages.context.stage_job import StageJob
    from orchestrator.stages.context.values import Planned

TABLE = "training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Train(Stage):
    """Train the compressed model towards the next-token distribution of the dense one."""

    name: ClassVar[str] = "train"
    tables: ClassVar[Mapping[str, type]] = {TABLE: TrainOptions}
    options: TrainOptions
    mode: str
    """`all`, `lean` or `light`."""

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        if recipe.train == "none":
            return None
        return cls(options=train_options(recipe), mode=recipe.train)

    @classmethod
    def check(cls, recipe: Recipe, method: MethodTraits) -> None:
        check_known(TABLE, recipe.options.get(TABLE, {}), option_names(TrainOptions))
        if recipe.train != "none" and method.refits:
            raise UsageError(
                f"train is {recipe.train!r} and {method.name}'s refit is on; training fits left "
                "factors too, so give refit 'never' or train 'none'"
            )
        options, form = train_options(recipe), FORMS[method.form]
        if recipe.train != "none" and options.mixed and not (form.has_rank or form.has_nonzeros):
            raise UsageError(
                f"training.mixed is {options.mixed} and {method.name} leaves linears that are "
                f"{form.name}, which no training turns to; give training.mixed 0"
            )

    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        from orchestrator.stages.train.job import TrainJob

        return TrainJob(planned, earlier, self.options, self.mode)

    def cost(self, setting: "Setting") -> "StageCost":
        from orchestrator.stages.train.cost import TrainCost

        return TrainCost(setting, self.options, self.mode)


def train_options(recipe: Recipe) -> TrainOptions:
    """Raises UsageError for an option that does not exist or is not allowed."""
    table = recipe.options.get(TABLE, {})
    check_known(TABLE, table, option_names(TrainOptions))
    return TrainOptions(**table)
