"""Worker that compensates and trains the blocks of a compressed model in order."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.device.malloc import return_freed_memory
from orchestrator.device.transport import Departure
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.compensation import (
    compensate_block,
    read_errors,
    restore,
    squared_error,
)
from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.refine import Refinement, merge
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.calls import Command
from orchestrator.runtime.replicated_blocks import ReplicaCommand
from orchestrator.runtime.worker import Emitted, Worker
from orchestrator.stages.context.gradients import merge_records, pack
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import TrainedUnits
from orchestrator.stages.context.worker.open_shard import DenseModel
from orchestrator.stages.context.worker.trained_worker import CompressedModel
from orchestrator.stages.walk.commands import ComputeGradients, ForwardDense
from orchestrator.store.chunks import Chunks, MissingChunk

RoundResult = tuple[dict[int, Any], dict[str, Any]]
"""Values of the parts of a round, and the state that is equal in all replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkSettings:
    """Settings of a walk."""

    units: TrainedUnits
    compensation: CompensationOptions | None
    refinement: RefineOptions | None
    changed: frozenset[int]
    """Blocks with a linear that is cut; the others do not change."""
    dense_key: str
    """Key of the dense model's chunks; that of the compressed model's is the `pass_key` of
    the task."""
    sequences: int


@dataclass(slots=True, kw_only=True)
class OpenBlock:
    """The current block, and the chunks and results of this replica."""

    block: int
    dense: Shard
    shard: Shard
    dense_inputs: list[Chunk]
    inputs: list[Chunk]
    start: float
    targets: dict[int, Chunk] = field(default_factory=dict)
    outputs: dict[int, Chunk] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Changed tensors of the block, by name in the model."""
    refinement: Refinement | None = None
    gradients: dict[int, Tensor] | None = None
    """Gradients of a step that is computed by this replica alone and not yet applied."""


class WalkWorker(Worker):
    """Replica of the current block of the dense and the compressed model.

    Each output chunk is computed by one replica and stored in a file for all. Slices of a step's
    gradient are sent as records, and every replica performs the step.

    Memory beside the two blocks: input chunks of all sequences of both models and output chunks of
    the dense one (70B and 256 × 2048 tokens: 8.6 GB each in bfloat16, twice that for the compressed
    model, which is float32), this replica's part of the compressed outputs, and the memory of
    compensation or training: 4 bytes per trained parameter for every slice of a step that a replica
    computes.
    """

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.settings: WalkSettings = task.settings
        self.dense = DenseModel(task, self.run, self.device)
        self.compressed = CompressedModel(self, task, self.dense, self.settings.units)
        self._dense_chunks = self.run.chunks(self.settings.dense_key, self.environment())
        self._resources = ExitStack()
        self._open: OpenBlock | None = None
        self._outputs: tuple[int, dict[int, Chunk], dict[int, Chunk]] = (-1, {}, {})
        """Boundary, dense and compressed chunks after the last block."""

    def perform(self, command: Command, *records: Emitted) -> tuple[Any, Emitted]:
        """Execute a command; the first one of a round applies the records of the previous round."""
        if not isinstance(command, ReplicaCommand):
            (record,) = records
            return super().perform(command, record)
        state: dict[str, Any] = {}
        if command.is_first and isinstance(command, ForwardDense):
            self._open_block(command.block, command.is_committed)
        elif command.is_first:
            state["norm"] = self._step(records if command.reads else None)
        if isinstance(command, ComputeGradients):
            values, emitted = self.compute_gradients(**command.keywords(), emits=command.emits)
            return {"parts": values, "state": state}, emitted
        values, common = getattr(self, command.method)(**command.keywords())
        return {"parts": values, "state": state | common}, None

    def _open_block(self, block: int, is_committed: bool) -> None:
        """Open a block of both models; a committed one with the tensors of its unit.

        Raises:
            MissingChunk: An input chunk of the block is not stored.
        """
        self._close_block()
        part, start = range(block, block + 1), time.monotonic()
        dense = self._resources.enter_context(self.dense.lazy.shard(part))
        shard = self._resources.enter_context(self.compressed.planned.shard(part))
        dense_inputs, inputs = self._inputs_of(block)
        if is_committed:
            found = load_file(self.compressed.path(self.settings.units.keys[block]))
            names = {disk: name for name, disk in self.compressed.planned.disk_names.items()}
            restore(shard, {names[disk]: tensor for disk, tensor in found.items()})
        self._open = OpenBlock(
            block=block,
            dense=dense,
            shard=shard,
            dense_inputs=dense_inputs,
            inputs=inputs,
            start=start,
        )

    def _close_block(self) -> None:
        """Free the block."""
        self._open = None
        self._resources.close()
        return_freed_memory()

    @property
    def work(self) -> OpenBlock:
        """The current block."""
        if self._open is None:
            raise RuntimeError("no block is open; `forward_dense` comes first in a block's rounds")
        return self._open

    def forward_dense(self, parts: Sequence[int], block: int, is_committed: bool) -> RoundResult:
        """Pass chunks through the dense block; measure the errors of the compressed block."""
        work, errors = self.work, dict[int, tuple[int, Tensor]]()
        # outputs of the last block are read by other replicas only
        stored = block + 1 in self.settings.units.keys or self.settings.refinement is not None
        for index in parts:
            target = work.targets[index] = work.dense.forward(work.dense_inputs[index])
            if stored:
                self._emit(self._dense_chunks, block + 1, target)
            if block in self.settings.changed and not is_committed:
                errors[index] = squared_error(work.shard.forward(work.inputs[index]), target)
        self.flush_writes()
        return read_errors(errors), {}

    def compensate(self, parts: Sequence[int]) -> RoundResult:
        """Refit the block's factors, in every replica. Returns the measurements of its linears."""
        work, options = self.work, self.settings.compensation
        assert options is not None
        linears = [each for each in self.task.linears if each.block == work.block]
        work.tensors, facts = compensate_block(
            work.dense,
            work.shard,
            dense_inputs=work.dense_inputs,
            inputs=work.inputs,
            linears=linears,
            options=options,
        )
        return {}, {"linears": facts}

    def evaluate(self, parts: Sequence[int]) -> RoundResult:
        """Measure errors of held-out chunks. Returns them, and a digest of the parameters."""
        work, options = self.work, self.settings.refinement
        if work.refinement is None:
            assert options is not None
            targets = [self._target(index) for index in range(self.settings.sequences)]
            randomness = self.settings.units.randomness
            refinement = Refinement(
                work.shard, work.inputs, targets, options=options, randomness=randomness
            )
            work.refinement = self._resources.enter_context(refinement)
        errors = {part: work.refinement.error(part) for part in parts}
        return errors, {"digest": work.refinement.digest()}

    def compute_gradients(
        self, parts: Sequence[int], epoch: int, batch: int, keep: bool, *, emits: bool
    ) -> tuple[dict[int, Any], Emitted]:
        """Compute slices of a step's gradient.

        Args:
            keep: True if the state before the step is the best so far.

        Returns:
            The losses and tokens of the slices, and a record of their gradients; None in its place
            if this is the only replica, which keeps the sum.
        """
        work, record = self.work, dict[str, np.ndarray]()
        refinement = work.refinement
        assert refinement is not None
        if keep:
            refinement.keep()
        values = {}
        for part in parts:
            found = refinement.slice(epoch, batch, part)
            values[part] = found.losses, found.tokens
            if emits:
                record |= pack(part, found.gradients)
            else:
                work.gradients = merge([work.gradients or {}, found.gradients])
        return values, record if emits else None

    def _step(self, records: Sequence[Emitted] | None) -> float | None:
        """Perform a step with the gradients of all replicas, or with the sum of the only one.

        Returns:
            The norm of the gradient; None if there are no gradients.
        """
        work = self.work
        gradients, work.gradients = work.gradients, None
        if records is not None:
            if any(record is None for record in records):
                raise MissingChunk(work.block, -1)
            found = [record for record in records if record is not None]
            gradients = merge_records(found, self.device)
        if gradients is None:
            return None
        assert work.refinement is not None
        return work.refinement.step(gradients)

    def forward_compressed(self, parts: Sequence[int], keep: bool) -> RoundResult:
        """Pass chunks through the best state of the compressed block, and store them.

        Returns:
            Their errors from the outputs of the dense model.
        """
        work = self.work
        if work.refinement is not None:
            if keep:
                work.refinement.keep()
            work.tensors |= work.refinement.take_best()
        boundary, errors = work.block + 1, dict[int, tuple[int, Tensor]]()
        for index in parts:
            output = work.outputs[index] = work.shard.forward(work.inputs[index])
            if boundary in self.settings.units.keys:
                self._emit(self.chunks, boundary, output)
            errors[index] = squared_error(output, self._target(index))
        self._outputs = boundary, work.targets, work.outputs
        self.flush_writes()
        return read_errors(errors), {}

    def commit(self, parts: Sequence[int], facts: dict[str, Any]) -> RoundResult:
        """Commit the block's tensors, in the replica that has the part; free the block in all."""
        work, values = self.work, dict[int, dict[str, Any]]()
        for part in parts:
            seconds = time.monotonic() - work.start
            timings = {"seconds": seconds, "memory": self.usage().to_json()}
            values[part] = facts | {"timings": timings}
            tensors = {name: tensor.detach().cpu() for name, tensor in work.tensors.items()}
            self.compressed.commit_block(work.block, tensors, values[part])
        self._close_block()
        return values, {}

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint, with the tensors of the blocks that were changed."""
        return self.compressed.after.write(file, self.task.out)

    def _emit(self, store: Chunks, boundary: int, chunk: Chunk) -> None:
        """Store a chunk in a thread; `flush_writes` waits for it at the end of the round."""
        departure = Departure()
        self.store(boundary, chunk.index, chunk.pack(departure), departure, chunks=store)

    def _inputs_of(self, block: int) -> tuple[list[Chunk], list[Chunk]]:
        """Input chunks of both models: outputs of this worker where it has them, else files."""
        indices = range(self.settings.sequences)
        if block == 0:
            first = [self.dense.first_chunk(index) for index in indices]
            return first, first
        boundary, *outputs = self._outputs
        own = outputs if boundary == block else ({}, {})
        dense, compressed = (
            [chunks[index] if index in chunks else _read(store, block, index) for index in indices]
            for chunks, store in zip(own, (self._dense_chunks, self.chunks), strict=True)
        )
        return dense, compressed

    def _target(self, index: int) -> Chunk:
        """Output chunk of the dense block, whichever replica has computed it."""
        work = self.work
        if index not in work.targets:
            work.targets[index] = _read(self._dense_chunks, work.block + 1, index)
        return work.targets[index]


def _read(store: Chunks, boundary: int, index: int) -> Chunk:
    record = store.read(boundary, index)
    if record is None:
        raise MissingChunk(boundary, index)
    return Chunk.unpack(record)
