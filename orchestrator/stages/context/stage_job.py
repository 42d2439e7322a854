"""A stage after the plan, on the driver: its interface, and its result."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.task import CompressionTask


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """Outcome of a stage, for the files of the result and for the report."""

    name: str
    key: str
    """Key of all units of the stage: part of the keys of the written files."""
    report: Any
    """JSON that is equal for two equal runs."""
    timings: Mapping[str, Any] = field(default_factory=dict)
    """JSON that may differ between two equal runs."""
    numerics: Mapping[str, Any] = field(default_factory=dict)
    """Measurements of linears, by their names."""
    has_gradients: bool = False
    """True if blocks were trained by gradients."""


class StageJob(ABC):
    """One stage with a plan: keys and task are known, no unit has been computed.

    Jobs are made in the order of execution, each from the jobs before it.
    """

    name: str
    key: str
    trained_units: Mapping[int, str] | None = None
    """Keys of its units of trained tensors, by block; None if it trains none."""
    worker_class: type[Worker]
    supersedes: ClassVar[bool] = False
    """True if a block's unit holds all stored tensors of its linears, so that the units of the job
    directly before it can be removed once it is committed (`spend`)."""

    @property
    @abstractmethod
    def task(self) -> CompressionTask:
        """The task of the workers, which also write the result if no later stage takes them."""

    @abstractmethod
    def perform(self, stage: RunningStage, following: "StageJob | None" = None) -> StageResult:
        """Make the units that do not exist yet.

        Args:
            following: The job directly after this one.
        """

    def spend(self, block: int) -> None:
        """Remove the units of a block; called by a job that `supersedes` this one."""
        return None

    def reusable_blocks(self, stage: RunningStage) -> Mapping[int, dict[str, Any]]:
        """Facts of the blocks that an earlier run has committed, of a job that `supersedes`."""
        return {}
