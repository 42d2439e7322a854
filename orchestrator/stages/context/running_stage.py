"""A stage that is running, as its functions on the driver are given it."""

from dataclasses import dataclass
from typing import Any

from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.workers import WorkerGroup


@dataclass(frozen=True, slots=True)
class RunningStage:
    """Workers and monitors of a stage that is running."""

    workers: WorkerGroup
    monitor: RunMonitor
    within: StageMonitor

    @property
    def name(self) -> str:
        return self.within.name

    def progress(self, done: int, total: int, **facts: Any) -> None:
        """Report that one more unit of `total` is done."""
        self.within.progress(done, total, **facts)
