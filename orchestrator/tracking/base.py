"""Protocol of trackers: the run, series of numbers, and its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Description of a run for a tracker."""

    name: str
    """Name of the run directory."""
    place: str
    """The run directory, absolute; a resumed run has the same one."""
    beside: str
    """Directory for files of a tracker that has no store of its own."""
    settings: Mapping[str, Any]
    """Fields of the recipe or of the evaluation."""

    @property
    def group(self) -> str:
        """Project or experiment of all runs, unless the tracker's own setting names one."""
        return "orchestrator"


class Tracker(Protocol):
    """One library. The constructor begins the run, or continues it if the library can."""

    def __init__(self, run: TrackedRun) -> None: ...

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Add one point to the series `group/name`; `step` counts within its group."""

    def end(self, state: str) -> None:
        """Finish the run, which is `done`, `failed` or `stopped`."""
