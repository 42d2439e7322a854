"""Contents of the small files of a run directory, as the live page shows them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.pages.evaluation import is_evaluation
from orchestrator.store.run import CANDIDATES


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
    def is_candidate(self) -> bool:
        """True if a search has made the last output, which it evaluates and removes."""
        return str(self.description.get("out")).rpartition("/")[0].endswith(CANDIDATES)

    @property
    def has_report(self) -> bool:
        """True if there is a report of such a run: of a compression, or of an evaluation."""
        return bool(self.recipe) or is_evaluation(self.description)

    @property
    def recipe(self) -> Mapping[str, Any]:
        recipe = self.description.get("recipe")
        return recipe if isinstance(recipe, dict) else {}
