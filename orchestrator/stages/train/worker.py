"""Worker of the training pipeline: a shard of the compressed model, forward and backward."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.training.mixed import DecomposedLinear, MixedLinears
from orchestrator.models.training.train import Training
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.runtime.calls import Command
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.pipeline.commands import EvaluateSequence, PassCommand
from orchestrator.stages.context.pipeline.shard import OpenTraining, PipelineShard
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import TrainedUnits
from orchestrator.stages.context.worker.open_shard import DenseModel
from orchestrator.stages.context.worker.stored import Decompositions
from orchestrator.stages.context.worker.trained_worker import CompressedModel
from orchestrator.store.units import unit_key

WHOLE = ("dense", "dropped")
"""Forms of linears that are not trained."""
BEST_VERSION = 1
"""Raised when the same steps give other values."""


def best_key(key: str, block: int) -> str:
    """Return the key of a block's values at the best step so far, if states are not stored."""
    return unit_key("best", BEST_VERSION, [key], block=block)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of the training of the whole compressed model."""

    units: TrainedUnits
    options: TrainOptions
    mode: str
    target_keys: tuple[str, ...]
    """For each sequence the unit of the dense model's top-k; none if they are recomputed."""
    mixed_steps: float
    """Steps over which linears turn from their decomposed weights to their forms; 0: none."""


class TrainWorker(Worker):
    """Trains a shard of the compressed model; see `PipelineShard`."""

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.settings: TrainSettings = task.settings
        self.dense = DenseModel(task, self.run, self.device)
        self.compressed = CompressedModel(self, task, self.dense, self.settings.units)
        recomputes = not self.settings.target_keys
        self.pipeline = PipelineShard(
            self, task, self.dense, self._trained_shard, recomputes=recomputes
        )
        self._mixed: MixedLinears | None = None
        self._done = 0

    def perform(self, command: Command, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a command; a pass of the pipeline takes its input chunk and emits its own.

        Only passes of a step mix weights; held-out sequences pass through what is stored.
        """
        if isinstance(command, PassCommand):
            if self._mixed is not None:
                is_step = not isinstance(command, EvaluateSequence)
                self._mixed.choose(self._done if is_step else None)
            return self.pipeline.perform(command, record)
        return super().perform(command, record)

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Load a dense shard, for the targets."""
        self.pipeline.open(range(*blocks))

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the dense weights of later blocks into the system's cache."""
        self.dense.lazy.read_ahead(blocks)

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass a dense chunk on; after the last block its top-k is committed."""
        return self.pipeline.step(index, emit, record)

    def next_inputs(self, index: int) -> list[Stored]:
        return self.pipeline.next_inputs(index)

    def take(self, blocks: tuple[int, int], step: int) -> dict[str, Any]:
        """Open a shard at the snapshot after a step; at step 0 it is as planned."""
        self._mixed, self._done = None, step
        return self.pipeline.take(range(*blocks), step)

    def _trained_shard(self, blocks: range) -> OpenTraining[Training]:
        work = self._planned_shard(blocks)
        if self._done < self.settings.mixed_steps:
            try:
                self._mixed = self._mixed_linears(work.model)
            except BaseException:
                work.model.close()
                raise
        return work

    def _mixed_linears(self, model: Shard) -> MixedLinears:
        """Give the cut linears of an open shard their decomposed weights beside their forms."""
        settings, blocks = self.settings, model.blocks
        if self.pipeline.recomputes:
            weights = self._decomposed(self.pipeline.dense_shard.shard)
        else:
            with self.dense.lazy.shard(blocks) as dense:
                weights = self._decomposed(dense)
        return MixedLinears(model, weights, settings.mixed_steps, settings.units.randomness)

    def _decomposed(self, dense: Shard) -> dict[str, DecomposedLinear]:
        """Return what was decomposed of the cut linears of an open shard of the dense model."""
        task, assignments = self.task, self.settings.units.plan.assignments
        decompositions = Decompositions(task, self.run, self.device)
        found = {}
        for linear in task.linears:
            if linear.block in dense.blocks and assignments[linear.name].form not in WHOLE:
                module, stored = dense.module(linear.name), decompositions.stored(linear)
                weight_OI = task.method.kind.decomposed(stored, dense_weight(module))
                bias = getattr(module, "bias", None)
                bias_O = bias.detach() if isinstance(bias, Tensor) else None
                found[linear.name] = DecomposedLinear(weight_OI, bias_O)
        return found

    def _planned_shard(self, blocks: range) -> OpenTraining[Training]:
        planned = self.compressed.planned
        model = planned.shard(blocks)
        training = Training(
            model,
            self.settings.units.keys.keys(),
            planned.disk_names.keys(),
            mode=self.settings.mode,
            weight_decay=self.settings.options.weight_decay,
        )
        return OpenTraining(model, training)

    def update(self, step: int, scale: float, rate: float) -> None:
        """Make one step of the optimiser."""
        self.pipeline.work.training.update(step, scale, rate)
        self._done = step

    def snapshot(self, step: int) -> None:
        """Commit the state of every block that is trained."""
        self.pipeline.snapshot(step)

    def keep(self, step: int, is_best: bool) -> None:
        """Commit the values of every block in place of earlier ones, if the step is the best."""
        if not is_best:
            return
        for block in sorted(self.settings.units.keys.keys() & set(self.pipeline.work.model.blocks)):
            key = best_key(self.task.pass_key, block)
            self.run.units.drop(key)
            self.compressed.commit(
                key, self._outcome(self.pipeline.work.training, block), {"step": step}
            )

    def commit(
        self, blocks: tuple[int, int], step: int, facts: dict[str, Any], is_kept: bool
    ) -> None:
        """Commit the parameters at the best step of blocks that no cut separates.

        Args:
            is_kept: True if `keep` has committed the values; otherwise they are those of a state,
                or of the plan.
        """
        self._mixed = None
        self.pipeline.close()
        wanted = sorted(self.settings.units.keys.keys() & set(range(*blocks)))
        if is_kept:
            for block in wanted:
                best = load_file(self.compressed.path(best_key(self.task.pass_key, block)))
                self.compressed.commit(self.settings.units.keys[block], best, facts)
            return
        work = self._planned_shard(range(*blocks))
        with work.model:
            self.pipeline.load_state(work.training, step)
            for block in wanted:
                outcome = self._outcome(work.training, block)
                self.compressed.commit(self.settings.units.keys[block], outcome, facts)
        return_freed_memory()

    def _outcome(self, training: Training, block: int) -> dict[str, Tensor]:
        """Return the trained tensors of a block in the dtypes of the output; no stage follows."""
        dtypes = self.compressed.as_written.dtype
        stored = self.compressed.stored(training.tensors(block))
        return {name: tensor.to(dtypes(name)) for name, tensor in stored.items()}

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint, with the trained tensors."""
        return self.compressed.after.write(file, self.task.out)
