"""What the stages that train the compressed model share: keys, and what their workers are told."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.worker import Worker
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.task import CompressionTask
from orchestrator.store.units import unit_key

if TYPE_CHECKING:
    from orchestrator.stages.context.compression import Compression


class TrainedStage(ABC):
    """A stage behind the plan, that leaves a unit of trained tensors for each block it changes.

    Stages stand in a row: each begins where those before it have left the model.

    Args:
        earlier: The stages before.
        version: Raised when a trained tensor changes.
        decisive: What decides the tensors beside the plan, the seed and the stages before.
    """

    name: ClassVar[str]
    worker_class: ClassVar[type[Worker]]

    def __init__(
        self,
        job: "Compression",
        earlier: Sequence["TrainedStage"],
        *,
        version: int,
        **decisive: Any,
    ) -> None:
        self._job = job
        self._earlier = tuple(earlier)
        before = [each.key for each in earlier]
        inputs = [job.pass_key, *job.block_keys.values(), *job.choice, *before]
        self.key: str = unit_key(
            self.name,
            version,
            inputs,
            plan=job.plan.to_json(),
            seed=job.recipe.seed,
            **decisive,
        )
        """The name of what all blocks become."""
        self.keys: Mapping[int, str] = {
            block: unit_key(f"{self.name} block", version, [self.key], block=block)
            for block in self.blocks
        }

    @property
    def blocks(self) -> list[int]:
        """The blocks that are trained: those with a linear that is cut."""
        forms = {name: each.form for name, each in self._job.plan.assignments.items()}
        return sorted({each.block for each in self._job.linears if forms[each.name] != "dense"})

    @property
    def has_gradients(self) -> bool:
        """True if its blocks are trained by gradients; some stages solve instead."""
        return True

    @property
    def shared(self) -> dict[str, Any]:
        """The fields of the workers' task that all such stages have."""
        job = self._job
        return {field.name: getattr(job.task, field.name) for field in fields(CompressionTask)} | {
            "pass_key": self.key,
            "plan": job.plan,
            "seed": job.recipe.seed,
            "choice": "".join(job.choice),
            "earlier": tuple(each.keys for each in self._earlier),
            "keys": self.keys,
        }

    @property
    @abstractmethod
    def task(self) -> Any:
        """What the workers need to know."""

    @abstractmethod
    def perform(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Makes the units that are not there yet."""

    @property
    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What training did, as JSON; nothing that may differ between two equal runs."""

    @property
    @abstractmethod
    def timings(self) -> dict[str, Any]:
        """What it took, which may."""
