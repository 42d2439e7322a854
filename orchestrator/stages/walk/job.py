"""Walk of the blocks in order, on the inputs that compressed blocks produce: the driver's part."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine_ledger import Ledger
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
    """A unit of tensors for each block, block 0 first, each made from what those before it give.

    Where the recipe compensates, the block's factors are fitted to the inputs that the compressed
    model makes (`linalg.compensate`); where it refines in order, the block is trained on them then
    towards what the dense block gives on its own (`models.training.refine`). One block is at work
    at a time, and all workers replicate it (`runtime.replicated_blocks`, `program`): they share its
    chunks, the slices of every step's gradient and the held-out chunks, and add the parts up in an
    order that neither workers nor failures change. Each worker repeats compensation's solves.

    A lost worker costs the others what it was at; the last one costs the block, and so does a node
    with a record on it. The chunks before the block lie in the run directory.

    AA-SVD (arXiv:2604.02119) as its code runs by default: method `svd-llm`, allocation `uniform`,
    refine `in_order`, and compensate `none`, because its input-aware start (its objective 2) is
    truncated on the dense model's inputs. Its other starts are compensate `input` (objective 3, the
    shifted inputs alone) and `anchored` (objective 4), with the basis `new`.
    Departures: some sequences are held out and the best state is kept, not the last; training ends
    early where it no longer helps; batches are drawn anew each epoch and the first step counts; a
    block whose linears all stay dense is not trained; the head is left alone, in both.
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
        """Pass the chunks of both models from block to block."""
        streams = self._dense_key, self.key
        passes = block_pass(self._planned, self._planned.forecast)
        facts = passes.in_order(streams, self.keys, self._program, stage, outline=self._outline())
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

    def _outline(self) -> dict[str, float]:
        """Parts of the rounds of a block, as if its training took all of its epochs."""
        sequences = self._planned.sequences
        parts = {"look": sequences, "leave": sequences, "commit": 1}
        if self._compensation is not None:
            parts["compensate"] = 1
        if self._refinement is not None:
            ledger = Ledger(sequences, self._refinement)
            epochs, batches = self._refinement.epochs, range(ledger.batches)
            parts["evaluate"] = len(ledger.held_out) * (epochs + 1)
            parts["descend"] = epochs * sum(ledger.parts(batch) for batch in batches)
        return {kind: float(count) for kind, count in parts.items()}

    def _program(self, block: int, is_made: bool) -> Program:
        task = self.task
        return walk_block(
            block,
            task.sequences,
            is_made=is_made,
            is_changed=block in task.changed,
            compensates=task.compensation is not None,
            refinement=task.refinement,
        )


class SweepJob(WalkJob):
    """A walk over blocks that were refined in parallel: each is trained once more.

    It corrects what a block has learnt on the dense model's inputs for the inputs that the
    compressed model produces.
    """

    name: ClassVar[str] = "sweep"


def _reported(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A block's facts without what may differ between two equal runs."""
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
