"""Cost of a stage: interface, and the setting that all stages of a forecast share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from orchestrator.forecast.costs import Costs
from orchestrator.forecast.memory import Footprint
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.room import Room
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.work import Work
from orchestrator.recipe.recipe import Recipe

Parts = Mapping[str, float]
"""Bytes of the run directory's content, by what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Model, recipe and machines of a forecast."""

    costs: Costs
    room: Room
    """Memory of a worker."""
    rates: tuple[Rates, ...]
    """Rows of rates of the machine."""
    workers: int
    shards: int
    """Shards of the calibration."""
    groups: int = 1
    """Groups of experts, each with passes of its own."""

    @property
    def shapes(self) -> Shapes:
        return self.costs.shapes

    @property
    def recipe(self) -> Recipe:
        return self.costs.recipe

    @property
    def kept(self) -> float:
        """Kept fraction of the targeted values."""
        return self.costs.kept

    @property
    def is_even(self) -> bool:
        """True if every linear keeps the same fraction."""
        return self.costs.allocator.is_even

    @property
    def tokens(self) -> int:
        """Tokens of a sequence."""
        return self.costs.tokens

    @property
    def sequences(self) -> int:
        return self.costs.sequences

    @property
    def kept_values(self) -> float:
        """Number of values that are kept of all linears."""
        return self.kept * sum(each.values for each in self.shapes.linears)

    @property
    def in_flight(self) -> float:
        """Bytes of a pass that keeps no chunks: those before each open shard, and behind all."""
        return min(self.shards - 1, self.workers + 1) * self.costs.boundary

    def seconds(self, take: Callable[[Rates], float]) -> dict[str, float]:
        """Seconds by row of rates, from a function of the rates."""
        return {rates.row: take(rates) for rates in self.rates}


class StageCost(ABC):
    """Cost of one stage in a setting."""

    unpacks_boundary: ClassVar[bool] = False
    """True if a worker unpacks the chunks of a whole boundary from files."""
    is_float64: ClassVar[bool] = False
    """True if most of the stage is products in float64, which some devices compute slowly."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def forecast(self, held: Footprint) -> StageForecast:
        """FLOPs, seconds and memory.

        Args:
            held: Peak content of the run directory in this stage.
        """

    @abstractmethod
    def content(self, before: Parts) -> tuple[Parts, Parts]:
        """Peak content of the run directory in this stage, and its content at the end."""

    def calls(self) -> Sequence[Work]:
        """Work of its calls if they are independent of each other; a simulation runs these.

        Empty by default: the calls of the stage depend on each other, and it is not simulated.
        """
        return ()

    def shares(self) -> Mapping[str, Work]:
        """Work of a unit of each kind of its calls (`Schedule.share`), for the time that is left.

        Empty by default: the time is known once calls of every kind have ended.
        """
        return {}

    def keeps_states(self, held: Footprint) -> bool:
        """True if the stage resumes from its content; False if it begins again.

        Args:
            held: As in `forecast`.
        """
        return True

    @abstractmethod
    def remedy(self) -> str:
        """Changes of the command with which the stage fits, or is left out."""
