"""Refinement of blocks in parallel, on the dense model's inputs: the driver's part."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.decompose import block_pass, compression_task
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import changed_blocks, trained_units
from orchestrator.stages.context.values import Planned
from orchestrator.stages.refine.worker import RefineSettings, RefineWorker

REFINE_VERSION = 3
"""Raised when the trained tensors change, or the tensors stored beside them."""


class RefineJob(StageJob):
    """One pass of dense chunks, and a unit of trained tensors for each block with a cut linear.

    Blocks do not wait for each other: each learns the outputs of its dense block on the dense
    model's own inputs. Published methods take the blocks in order, on the inputs that the
    compressed blocks before them produce.

    A block's unit holds all stored tensors of its linears, so the units of the job before it are
    then spent: a run directory holds a block once. If it is damaged later, both are made again.
    """

    name = "refine"
    supersedes: ClassVar[bool] = True
    worker_class: type[Worker] = RefineWorker

    def __init__(
        self, planned: Planned, earlier: Sequence[StageJob], options: RefineOptions
    ) -> None:
        # no block is shared by workers, so its gradient is one sum
        self._options = replace(options, slices=1)
        self._spend: Callable[[int], None] = earlier[-1].spend if earlier else lambda block: None
        self._reusable: dict[int, dict[str, Any]] | None = None
        self._planned = planned
        self._units = trained_units(
            planned,
            earlier,
            name=self.name,
            version=REFINE_VERSION,
            blocks=changed_blocks(planned),
            options=self._decisive,
        )
        self.key, self.trained_units = self._units.key, self._units.keys

    @property
    def _decisive(self) -> dict[str, Any]:
        """The options that decide the trained tensors."""
        return {name: each for name, each in asdict(self._options).items() if name != "slices"}

    @property
    def task(self) -> CompressionTask:
        settings = RefineSettings(units=self._units, options=self._options)
        return compression_task(self._planned, pass_key=self.key, settings=settings)

    def perform(self, stage: RunningStage, following: StageJob | None = None) -> StageResult:
        """Pass dense chunks through the shards; then train each shard's blocks."""
        passes = block_pass(self._planned, self._planned.forecast)
        passes, done = replace(passes, on_committed=self._spend), self._committed(stage)
        facts = passes.forward(self.key, self._units.keys, stage, done)
        return StageResult(
            name=self.name,
            key=self.key,
            report={
                "options": self._decisive,
                "errors": "errors of linears are those before their blocks were refined",
                "blocks": {str(block): _reported(facts[block]) for block in sorted(facts)},
            },
            timings={str(b): facts[b]["timings"]["seconds"] for b in sorted(facts)},
            has_gradients=True,
        )

    def reusable_blocks(self, stage: RunningStage) -> dict[int, dict[str, Any]]:
        return self._committed(stage)

    def _committed(self, stage: RunningStage) -> dict[int, dict[str, Any]]:
        """Facts of the blocks that an earlier run has refined; their files are verified once."""
        if self._reusable is None:
            passes = block_pass(self._planned, self._planned.forecast)
            self._reusable = passes.committed(self._units.keys, stage, self.name)
        return self._reusable


def _reported(facts: dict[str, Any]) -> dict[str, Any]:
    """Effect of the training on a block's error on the held-out sequences."""
    losses = [facts["start"], *(epoch["held_out"] for epoch in facts["epochs"])]
    return {
        "before": facts["start"],
        "after": losses[facts["best"]],
        "best_epoch": facts["best"],
        "steps": facts["steps"],
        "stop": facts["stop"],
    }
