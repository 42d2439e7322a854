"""Refining blocks in parallel, on the dense model's inputs: the driver's part."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.trained_stage import TrainedStage
from orchestrator.stages.refine.worker import RefineTask, RefineWorker

if TYPE_CHECKING:
    from orchestrator.stages.context.compression import Compression

REFINE_VERSION = 3
"""Raised when the trained tensors change, or the tensors stored beside them."""


class Refine(TrainedStage):
    """One pass of dense chunks, and a unit of trained tensors for each block with a cut linear.

    Blocks do not wait for each other: each learns to give what its dense block gives on the dense
    model's own inputs. Published methods walk the blocks in order, each behind the compressed ones.

    A block's unit holds all stored tensors of its linears, so the units that it supersedes are then
    spent (`replaces`): a run directory holds a block once. If it is damaged later, both are made
    again.
    """

    name: ClassVar[str] = "refine"
    worker_class: ClassVar[type[RefineWorker]] = RefineWorker

    def __init__(self, job: "Compression", earlier: Sequence[TrainedStage]) -> None:
        self.replaces: Callable[[int], None] = lambda block: None
        """Called with each block whose unit is committed."""
        self._there: dict[int, dict[str, Any]] | None = None
        # nobody lends a block here: its gradients are one sum
        self._options = replace(job.refine_options, slices=1)
        super().__init__(job, earlier, version=REFINE_VERSION, options=self._decisive)

    @property
    def _decisive(self) -> dict[str, Any]:
        """The options that say what is trained."""
        return {name: each for name, each in asdict(self._options).items() if name != "slices"}

    @property
    def task(self) -> RefineTask:
        return RefineTask(**self.shared, options=self._options)

    def perform(self, workers: WorkerGroup, monitor: RunMonitor, stage: StageMonitor) -> None:
        """Dense chunks flow through the shards; then each shard's blocks are trained."""
        passes, done = self._job.block_pass, self.reusable_units(workers, monitor)
        passes = replace(passes, on_committed=self.replaces)
        self._facts = passes.forward(self.key, self.keys, workers, monitor, stage, done)

    def reusable_units(
        self, workers: WorkerGroup, monitor: RunMonitor
    ) -> dict[int, dict[str, Any]]:
        """Facts of the blocks that an earlier run has refined; their files are verified once."""
        if self._there is None:
            self._there = self._job.block_pass.committed(self.keys, workers, monitor, self.name)
        return self._there

    @property
    def timings(self) -> dict[str, Any]:
        """Seconds that each block took, when it was made."""
        return {str(b): facts["timings"]["seconds"] for b, facts in sorted(self._facts.items())}

    @property
    def report(self) -> dict[str, Any]:
        """What training did to each block's error on the sequences that were held out."""
        blocks = {}
        for block, facts in sorted(self._facts.items()):
            losses = [facts["start"], *(epoch["held_out"] for epoch in facts["epochs"])]
            blocks[str(block)] = {
                "before": facts["start"],
                "after": losses[facts["best"]],
                "best_epoch": facts["best"],
                "steps": facts["steps"],
                "stop": facts["stop"],
            }
        return {
            "options": self._decisive,
            "errors": "errors of linears are those before their blocks were refined",
            "blocks": blocks,
        }
