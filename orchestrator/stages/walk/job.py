"""Compensation and training of blocks in order, on compressed inputs: the driver's part."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.replicated_blocks import Program
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.decompose import block_pass
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.trained_stage import TrainedStage
from orchestrator.stages.context.values import Planned
from orchestrator.stages.walk.program import walk_block
from orchestrator.stages.walk.worker import WalkTask, WalkWorker
from orchestrator.store.units import unit_key

WALK_VERSION = 2
"""Raised when a tensor changes, or the input of a block."""


class WalkJob(TrainedStage):
    """A unit of tensors per block, in order, each computed from the outputs of the preceding ones.

    If the recipe compensates, the block's factors are refitted to the inputs that the compressed
    model produces (`linalg.compensate`). If it refines in order, the block is then trained on these
    inputs towards the outputs of the dense model (`models.training.refine`). One block is processed
    at a time, and all workers replicate it (`runtime.replicated_blocks`, `program`): they share its
    chunks, the slices of every step's gradient and the held-out chunks, and add the parts in an
    order that neither workers nor failures change. Each worker repeats the solves of compensation.

    If a worker is lost, the others repeat its parts of the round. If the last one is lost, or a
    node with a record, the block is repeated from its input chunks in the run directory.

    AA-SVD (arXiv:2604.02119) as its code runs by default: method `svd-llm`, allocation `uniform`,
    refine `in_order`, and compensate `none`, because its input-aware start (its objective 2) is
    truncated on the dense model's inputs. Its other starts are compensate `input` (objective 3, the
    shifted inputs alone) and `anchored` (objective 4), with the basis `new`.
    Departures: some sequences are held out and the best state is kept, not the last; training stops
    early; batches are drawn anew each epoch and the first step has a rate above 0; a block whose
    linears all stay dense is not trained. Neither trains the head.
    """

    name: ClassVar[str] = "walk"
    worker_class: type[Worker] = WalkWorker

    def __init__(
        self,
        planned: Planned,
        earlier: Sequence[StageJob],
        compensation: CompensationOptions | None,
        refinement: RefineOptions | None,
    ) -> None:
        self._compensation, self._refinement = compensation, refinement
        self._options = {
            "compensation": compensation and asdict(compensation),
            "refinement": refinement and asdict(refinement),
        }
        super().__init__(planned, earlier, version=WALK_VERSION, **self._options)
        self._dense_key = unit_key(f"{self.name} dense", WALK_VERSION, [planned.pass_key])

    @property
    def blocks(self) -> list[int]:
        """All blocks up to the last with a linear that is cut."""
        return list(range(max(super().blocks, default=-1) + 1))

    @property
    def task(self) -> WalkTask:
        return WalkTask(
            **self.shared,
            compensation=self._compensation,
            refinement=self._refinement,
            changed=frozenset(super().blocks),
            dense_key=self._dense_key,
            sequences=self._planned.sequences,
        )

    def perform(self, stage: RunningStage, following: StageJob | None = None) -> StageResult:
        """Pass the chunks of the dense and the compressed model from block to block."""
        streams = self._dense_key, self.key
        passes = block_pass(self._planned, self._planned.forecast)
        facts = passes.in_order(streams, self.keys, self._program, stage)
        return StageResult(
            name=self.name,
            key=self.key,
            report={
                **self._options,
                "errors": "errors of linears above are those before the walk; of blocks here the "
                "mean squared difference from the dense model behind the block, before the block "
                "was changed and after",
                "blocks": {str(block): _reported(facts[block]) for block in sorted(facts)},
            },
            timings={str(b): facts[b]["timings"]["seconds"] for b in sorted(facts)},
            has_gradients=self._refinement is not None,
        )

    def _program(self, block: int, is_committed: bool) -> Program:
        task = self.task
        return walk_block(
            block,
            task.sequences,
            is_committed=is_committed,
            is_changed=block in task.changed,
            compensates=task.compensation is not None,
            refinement=task.refinement,
        )


class SweepJob(WalkJob):
    """Second training of blocks that were refined in parallel.

    Refinement in parallel uses inputs of the dense model; this adapts each block to the inputs that
    the compressed model produces.
    """

    name: ClassVar[str] = "sweep"


def _reported(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a block, without those that may differ between two equal runs."""
    entry = {name: each for name, each in facts.items() if name not in ("timings", "refinement")}
    if "refinement" in facts:
        trained = facts["refinement"]
        losses = [trained["start"], *(epoch["held_out"] for epoch in trained["epochs"])]
        entry["refinement"] = {
            "before": trained["start"],
            "after": losses[trained["best"]],
            "best_epoch": trained["best"],
            "steps": trained["steps"],
            "stop": trained["stop"],
        }
    return entry
