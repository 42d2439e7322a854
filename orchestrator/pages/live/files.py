"""Contents of the small files of a run directory, as the live page shows them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Contents of the small files of a run directory."""

    place: str
    """The run directory."""
    status: Mapping[str, Any] = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """The error of the last reading; empty if there was none."""

    @property
    def state(self) -> str:
        """State of the run; `new` before it has begun."""
        return str(self.status.get("state", "new"))

    @property
    def name(self) -> str:
        """Name of the output, else of the run directory."""
        place = str(self.description.get("out") or self.place).partition("?")[0]
        return place.rstrip("/").rpartition("/")[2]

    @property
    def recipe(self) -> Mapping[str, Any]:
        recipe = self.description.get("recipe")
        return recipe if isinstance(recipe, dict) else {}
