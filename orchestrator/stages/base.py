"""Interface of a stage after the plan: a name, a condition, checks and options, without torch.

A stage is a folder: `spec.py` with a class below `Stage`, `job.py` for the driver, `worker.py`, and
one line in `stages.STAGES`, or an entry point of another package.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from orchestrator.plan.grouping import Grouping
from orchestrator.recipe.options import check_known, option_names
from orchestrator.recipe.recipe import Recipe

if TYPE_CHECKING:
    from orchestrator.forecast.stage_cost import Setting, StageCost
    from orchestrator.stages.context.stage_job import StageJob
    from orchestrator.stages.context.values import Planned


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodTraits:
    """The properties of a method that stages are checked against, at the size of a recipe."""

    name: str
    form: str
    """Name of the form of the linears that are cut."""
    grouping: Grouping
    refits: bool
    """True if left factors are refitted to the inputs of the compressed model at this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(ABC):
    """A stage that a recipe asks for; its fields are its options.

    A recipe has no field for a stage of another package: it asks with a table of the stage's name,
    `[NAME]`, whose options are the fields.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    """Publication, `arXiv 2306.11695`; empty if it was derived here."""
    follows: ClassVar[str] = ""
    """Name of the stage after which it is executed; empty: at the end. For stages of other
    packages; built-in ones are in order."""
    tables: ClassVar[Mapping[str, type] | None] = None
    """Tables of the recipe with its options, each with the dataclass that has them as fields; None:
    one of the stage's name with the fields of the stage."""
    takes_towers: ClassVar[bool] = False
    """True if linears of a vision tower may be among the targeted ones."""
    changes_errors: ClassVar[bool] = True
    """False if the errors of linears are still those of their decompositions."""

    @classmethod
    def of(cls, recipe: Recipe, method: MethodTraits) -> Self | None:
        """The stage with its options; None if the recipe does not ask for it.

        Raises:
            UsageError: An option does not exist, or its value is not allowed.
        """
        table = recipe.options.get(cls.name)
        if table is None:
            return None
        check_known(cls.name, table, option_names(cls))
        return cls(**table)

    @classmethod
    def option_tables(cls) -> Mapping[str, type]:
        """Tables of the recipe with its options; see `tables`."""
        return {cls.name: cls} if cls.tables is None else cls.tables

    @property
    def used_tables(self) -> Collection[str]:
        """Tables of which the stage, as the recipe asks for it, takes the options."""
        return self.option_tables().keys()

    @classmethod
    def check(cls, recipe: Recipe, method: MethodTraits) -> None:
        """Raises UsageError for an option that is not allowed, or settings that exclude each other.

        Called for every stage, whether the recipe asks for it or not.
        """
        return None

    @abstractmethod
    def job(self, planned: "Planned", earlier: "Sequence[StageJob]") -> "StageJob":
        """The driver's half, with keys and the task of the workers.

        Args:
            earlier: Jobs of the stages before it.
        """

    @abstractmethod
    def cost(self, setting: "Setting") -> "StageCost":
        """Time, memory and storage that it takes, for the forecast."""


def stages_of(
    stages: Sequence[type[Stage]], recipe: Recipe, method: MethodTraits
) -> tuple[Stage, ...]:
    """The stages that the recipe asks for, with their options."""
    return tuple(found for each in stages if (found := each.of(recipe, method)) is not None)
