"""The stage that brings factors to pivoted storage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.errors import UsageError
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.recipe import Recipe
from orchestrator.stages.base import MethodTraits, Stage

if TYPE_CHECKING:
    from orchestrator.forecast.stage_cost import Setting, StageCost
    from orchestrator.stages.context.stage_job import StageJob
    from orchestrator.stages.context.values import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Pivot(Stage):
    """Store factors as rows of the weight and the others in terms of them (`linalg.pivot`)."""

    name: ClassVar[str] = "pivot"
    tables: ClassVar[Mapping[str, type]] = {}
    takes_towers: ClassVar[bool] = True
    changes_errors: ClassVar[bool] = False

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        return cls() if recipe.storage == "pivoted" else None

    @classmethod
    def check(cls, recipe: Recipe, method: MethodTraits) -> None:
        """Raises UsageError if the method stores no factors to pivot, or they share a basis."""
        if recipe.storage != "pivoted":
            return
        if method.form != "low_rank":
            kept = "entries" if FORMS[method.form].has_nonzeros else f"the form {method.form}"
            raise UsageError(
                f"storage is 'pivoted', which is for the factors of a low rank; {method.name} "
                f"keeps {kept}; give storage 'plain'"
            )
        if method.grouping.size > 1:
            raise UsageError(
                f"storage is 'pivoted' and {method.name}'s group is {method.grouping.size}; "
                "pivots are rows of one linear, so none share a basis; give group 1"
            )
        if method.grouping.is_shared:
            raise UsageError(
                f"storage is 'pivoted' and {method.name} shares bases among experts; pivots are "
                "rows of one linear, so none share a basis; give storage 'plain'"
            )

    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        from orchestrator.stages.pivot.job import PivotJob

        return PivotJob(planned, earlier)

    def cost(self, setting: "Setting") -> "StageCost":
        from orchestrator.stages.pivot.cost import PivotCost

        return PivotCost(setting)
