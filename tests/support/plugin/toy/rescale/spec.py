"""The stage without torch: options, checks, and the way to its halves."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.errors import UsageError
from orchestrator.recipe.options import check_number
from orchestrator.stages.base import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescale(Stage):
    """Scale every diagonal so that its outputs have the energy of the dense ones."""

    name: ClassVar[str] = "rescale"
    follows: ClassVar[str] = "pivot"

    largest: float = 4.0
    """Largest factor."""

    @classmethod
    def check(cls, recipe, method):
        if method.form != "diagonal":
            raise UsageError(f"rescale is for diagonals, and {method.name} keeps {method.form}")
        check_number("rescale: largest", recipe.options["rescale"].get("largest", 4.0), 1, 1e6)

    def job(self, planned, earlier):
        from toy.rescale.job import RescaleJob

        return RescaleJob(planned, earlier, self.largest)

    def cost(self, setting):
        from toy.rescale.cost import RescaleCost

        return RescaleCost(setting)
