"""Worker that changes the blocks of a compressed model in order, each on changed inputs."""

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
from orchestrator.stages.context.worker.open_shard import DenseModel
from orchestrator.stages.context.worker.trained_worker import CompressedModel, TrainedTask
from orchestrator.stages.walk.commands import Descend, Look
from orchestrator.store.chunks import Chunks, MissingChunk

Given = tuple[dict[int, Any], dict[str, Any]]
"""The values of a round's parts, and what all replicas must agree in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkTask(TrainedTask):
    """Task of a walk over the blocks."""

    compensation: CompensationOptions | None
    refinement: RefineOptions | None
    changed: frozenset[int]
    """Blocks with a linear that is cut; the others are passed through unchanged."""
    dense_key: str
    """The pass of the dense model's chunks; that of the compressed model is the `pass_key`."""
    sequences: int


@dataclass(slots=True, kw_only=True)
class OpenBlock:
    """The current block, and this replica's share of its chunks and results."""

    block: int
    dense: Shard
    shard: Shard
    dense_inputs: list[Chunk]
    inputs: list[Chunk]
    begun: float
    targets: dict[int, Chunk] = field(default_factory=dict)
    passed: dict[int, Chunk] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Changed tensors of the block, by name in the model."""
    refinement: Refinement | None = None
    gradients: dict[int, Tensor] | None = None
    """Gradients of a step that is computed by this replica alone and not yet applied."""


class WalkWorker(Worker):
    """Two streams of chunks from block to block: the dense model's, and the compressed one's.

    The workers are replicas of the block at hand. A chunk behind it is made by one of them, and a
    file for all; slices of a step's gradient travel as records, and each makes the step.

    Held beside a block of each: both streams of all sequences before the block and the dense one
    behind it (70B and 256 × 2048 tokens: 8.6 GB each in bfloat16, and twice that of the compressed
    one, which is float32), a share of the compressed one there, and what compensation or training
    take: for each trained parameter 4 bytes more for every slice that a replica makes of a step.
    """

    def __init__(self, task: WalkTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.dense = DenseModel(task, self.run, self.device)
        self.compressed = CompressedModel(self, task, self.dense)
        self._dense_chunks = self.run.chunks(task.dense_key, self.environment())
        self._held = ExitStack()
        self._work: OpenBlock | None = None
        self._left: tuple[int, dict[int, Chunk], dict[int, Chunk]] = (-1, {}, {})

    def perform(self, command: Command, *records: Emitted) -> tuple[Any, Emitted]:
        """Execute a command; the first one of a round reads what the last round has merged."""
        if not isinstance(command, ReplicaCommand):
            (record,) = records
            return super().perform(command, record)
        state: dict[str, Any] = {}
        if command.is_first and isinstance(command, Look):
            self._take_up(command.block, command.is_made)
        elif command.is_first:
            state["norm"] = self._step(records if command.reads else None)
        if isinstance(command, Descend):
            values, emitted = self.descend(**command.keywords(), emits=command.emits)
            return {"parts": values, "state": state}, emitted
        values, said = getattr(self, command.method)(**command.keywords())
        return {"parts": values, "state": state | said}, None

    def _take_up(self, block: int, is_made: bool) -> None:
        """Opens a block, as it is committed if it is made.

        Raises:
            MissingChunk: What the block starts from does not lie there.
        """
        self._put_down()
        part, begun = range(block, block + 1), time.monotonic()
        dense = self._held.enter_context(self.dense.lazy.shard(part))
        shard = self._held.enter_context(self.compressed.planned.shard(part))
        dense_inputs, inputs = self._entering(block)
        if is_made:
            found = load_file(self.compressed.path(self.task.keys[block]))
            names = {disk: name for name, disk in self.compressed.planned.disk_names.items()}
            restore(shard, {names[disk]: tensor for disk, tensor in found.items()})
        self._work = OpenBlock(
            block=block,
            dense=dense,
            shard=shard,
            dense_inputs=dense_inputs,
            inputs=inputs,
            begun=begun,
        )

    def _put_down(self) -> None:
        """Frees the block."""
        self._work = None
        self._held.close()
        return_freed_memory()

    @property
    def work(self) -> OpenBlock:
        """The current block."""
        if self._work is None:
            raise RuntimeError("no block is open; `look` comes first in a block's rounds")
        return self._work

    def look(self, parts: Sequence[int], block: int, is_made: bool) -> Given:
        """Passes dense chunks on, and says how far the compressed ones would be from them."""
        work, errors = self.work, dict[int, tuple[int, Tensor]]()
        # behind the last block only the other replicas ask for them
        stored = block + 1 in self.task.keys or self.task.refinement is not None
        for index in parts:
            target = work.targets[index] = work.dense.forward(work.dense_inputs[index])
            if stored:
                self._emit(self._dense_chunks, block + 1, target)
            if block in self.task.changed and not is_made:
                errors[index] = squared_error(work.shard.forward(work.inputs[index]), target)
        self.flush_writes()
        return read_errors(errors), {}

    def compensate(self, parts: Sequence[int]) -> Given:
        """Fits the block's factors again; every replica does, and says what was measured."""
        work, options = self.work, self.task.compensation
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

    def evaluate(self, parts: Sequence[int]) -> Given:
        """Errors of held-out chunks, and a digest of the parameters that gave them."""
        work, options = self.work, self.task.refinement
        if work.refinement is None:
            assert options is not None
            targets = [self._target(index) for index in range(self.task.sequences)]
            randomness = self.task.randomness
            refinement = Refinement(
                work.shard, work.inputs, targets, options=options, randomness=randomness
            )
            work.refinement = self._held.enter_context(refinement)
        errors = {part: work.refinement.error(part) for part in parts}
        return errors, {"digest": work.refinement.digest()}

    def descend(
        self, parts: Sequence[int], epoch: int, batch: int, keep: bool, *, emits: bool
    ) -> tuple[dict[int, Any], Emitted]:
        """Slices of a step's gradient: their losses, and a record, or a sum that stays here.

        Args:
            keep: Whether the state before the step is the best so far.
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
        """Makes a step, if there is one to make, with all slices or with what was summed here.

        Gives the gradient's norm.
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

    def leave(self, parts: Sequence[int], keep: bool) -> Given:
        """Passes compressed chunks through what the block has become at best, and stores them.

        Says how far they are from the dense ones.
        """
        work = self.work
        if work.refinement is not None:
            if keep:
                work.refinement.keep()
            work.tensors |= work.refinement.take_best()
        boundary, errors = work.block + 1, dict[int, tuple[int, Tensor]]()
        for index in parts:
            passed = work.passed[index] = work.shard.forward(work.inputs[index])
            if boundary in self.task.keys:
                self._emit(self.chunks, boundary, passed)
            errors[index] = squared_error(passed, self._target(index))
        self._left = boundary, work.targets, work.passed
        self.flush_writes()
        return read_errors(errors), {}

    def commit(self, parts: Sequence[int], facts: dict[str, Any]) -> Given:
        """One replica commits the block's tensors and gives its facts; all of them free it."""
        work, values = self.work, dict[int, dict[str, Any]]()
        for part in parts:
            seconds = time.monotonic() - work.begun
            timings = {"seconds": seconds, "memory": self.usage().to_json()}
            values[part] = facts | {"timings": timings}
            tensors = {name: tensor.detach().cpu() for name, tensor in work.tensors.items()}
            self.compressed.commit_block(work.block, tensors, values[part])
        self._put_down()
        return values, {}

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint, with the tensors of the blocks that were changed."""
        return self.compressed.after.write(file, self.task.out)

    def _emit(self, store: Chunks, boundary: int, chunk: Chunk) -> None:
        """Stores a chunk in a thread; `flush_writes` waits for it after the round."""
        departure = Departure()
        self.store(boundary, chunk.index, chunk.pack(departure), departure, chunks=store)

    def _entering(self, block: int) -> tuple[list[Chunk], list[Chunk]]:
        """Both streams at a block's input: what this worker has left there, else the files."""
        indices = range(self.task.sequences)
        if block == 0:
            first = [self.dense.first_chunk(index) for index in indices]
            return first, first
        boundary, *left = self._left
        held = left if boundary == block else ({}, {})
        dense, compressed = (
            [chunks[index] if index in chunks else _read(store, block, index) for index in indices]
            for chunks, store in zip(held, (self._dense_chunks, self.chunks), strict=True)
        )
        return dense, compressed

    def _target(self, index: int) -> Chunk:
        """The dense chunk behind the block, whoever has made it."""
        work = self.work
        if index not in work.targets:
            work.targets[index] = _read(self._dense_chunks, work.block + 1, index)
        return work.targets[index]


def _read(store: Chunks, boundary: int, index: int) -> Chunk:
    record = store.read(boundary, index)
    if record is None:
        raise MissingChunk(boundary, index)
    return Chunk.unpack(record)
