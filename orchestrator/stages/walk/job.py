"""Compensation and training of blocks in order, on compressed inputs: the driver's part."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine_ledger import Ledger, losses_of
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.replicated_blocks import Program
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.decompose import block_pass, compression_task
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.stage_job import StageJob, StageResult
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import changed_blocks, trained_units
from orchestrator.stages.context.values import Planned
from orchestrator.stages.walk.program import walk_block
from orchestrator.stages.walk.worker import WalkSettings, WalkWorker
from orchestrator.store.units import unit_key

WALK_VERSION = 2
"""Raised when a tensor changes, or the input of a block."""


class WalkJob(StageJob):
    """A unit of tensors per block, in order, each computed from the outputs of the preceding ones.

    If the recipe compensates, the block's factors are refitted to the inputs that the compressed
    model produces (`linalg.compensate`). If it refines in order, the block is then trained on these
    inputs towards the outputs of the dense model (`models.training.refine`). One block is processed
    at a time, and all workers replicate it (`runtime.replicated_blocks`, `program`): they share its
    chunks, the slices of every step's gradient and the held-out chunks, and add the parts in an
    order that neither workers nor failures change. Each worker repeats the solves of compensation.

    If a worker is lost, the others repeat its parts of the round. If the last one is lost, or a
    node with a record, the block is repeated from its input chunks in the run directory.

    A second training after refinement in parallel, which uses inputs of the dense model, adapts
    each block to the inputs that the compressed model produces.

    AA-SVD (arXiv:2604.02119) as its code runs by default: method `svd-llm`, allocation `uniform`,
    refine `in_order`, and compensate `none`, because its input-aware start (its objective 2) is
    truncated on the dense model's inputs. Its other starts are compensate `input` (objective 3, the
    shifted inputs alone) and `anchored` (objective 4), with the basis `new`.
    Departures: some sequences are held out and the best state is kept, not the last; training stops
    early; batches are drawn anew each epoch and the first step has a rate above 0; a block whose
    linears all stay dense is not trained. Neither trains the head.
    """

    worker_class: type[Worker] = WalkWorker

    def __init__(
        self,
        planned: Planned,
        earlier: Sequence[StageJob],
        compensation: CompensationOptions | None,
        refinement: RefineOptions | None,
        *,
        name: str,
    ) -> None:
        """Args: name: `walk`, or `sweep` for a second training of refined blocks."""
        self.name, self._planned = name, planned
        self._changed = changed_blocks(planned)
        self._compensation, self._refinement = compensation, refinement
        self._options = {
            "compensation": compensation and asdict(compensation),
            "refinement": refinement and asdict(refinement),
        }
        self._units = trained_units(
            planned,
            earlier,
            name=name,
            version=WALK_VERSION,
            # unchanged blocks before the last changed one pass chunks on
            blocks=range(max(self._changed, default=-1) + 1),
            **self._options,
        )
        self.key, self.trained_units = self._units.key, self._units.keys
        self._dense_key = unit_key(f"{self.name} dense", WALK_VERSION, [planned.pass_key])

    @property
    def task(self) -> CompressionTask:
        settings = WalkSettings(
            units=self._units,
            compensation=self._compensation,
            refinement=self._refinement,
            changed=frozenset(self._changed),
            dense_key=self._dense_key,
            sequences=self._planned.sequences,
        )
        return compression_task(self._planned, pass_key=self.key, settings=settings)

    def perform(self, stage: RunningStage, following: StageJob | None = None) -> StageResult:
        """Pass the chunks of the dense and the compressed model from block to block."""
        streams = self._dense_key, self.key
        passes = block_pass(self._planned, self._planned.forecast)
        outline = self._outline()
        program = partial(self._program, stage)
        facts = passes.in_order(streams, self._units.keys, program, stage, outline=outline)
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
        parts = {"forward_dense": sequences, "forward_compressed": sequences, "commit": 1}
        if self._compensation is not None:
            parts["compensate"] = 1
        if self._refinement is not None:
            ledger = Ledger(sequences, self._refinement)
            epochs, batches = self._refinement.epochs, range(ledger.batches)
            parts["evaluate"] = len(ledger.held_out) * (epochs + 1)
            parts["compute_gradients"] = epochs * sum(ledger.parts(batch) for batch in batches)
        return {kind: float(count) for kind, count in parts.items()}

    def _program(self, stage: RunningStage, block: int, is_committed: bool) -> Program:
        def on_epoch(ledger: Ledger) -> None:
            losses = losses_of(ledger.account().facts())
            event = {"event": "epoch", "stage": self.name, "block": block, "losses": losses}
            stage.monitor.event(event)

        return walk_block(
            block,
            self._planned.sequences,
            is_committed=is_committed,
            is_changed=block in self._changed,
            compensates=self._compensation is not None,
            refinement=self._refinement,
            on_epoch=on_epoch,
        )


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
