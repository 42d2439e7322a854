"""The dense model on a worker, one shard at a time, and passes of chunks through a shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.tokens import TokenArrays, first_chunk, read_tokens
from orchestrator.store.chunks import Chunks
from orchestrator.store.run import RunDirectory


class DenseModel:
    """The dense model and the calibration tokens, each opened at its first use."""

    def __init__(self, task: CompressionTask, run: RunDirectory, device: torch.device) -> None:
        self._task, self._run, self._device = task, run, device

    @cached_property
    def lazy(self) -> LazyModel:
        """The model without weights."""
        task = self._task
        return LazyModel.open(task.model, dtype=task.dtype, device=self._device)

    @cached_property
    def tokens(self) -> TokenArrays:
        """The calibration sequences."""
        return read_tokens(self._run, self._task.tokens_key)

    def first_chunk(self, sequence: int) -> Chunk:
        """Return a sequence at the model's input."""
        return first_chunk(self.tokens, sequence)

    def open(self, blocks: range, linears: Sequence[Linear] = (), **options: Any) -> "OpenShard":
        """Load a shard, with empty statistics of these linears.

        Args:
            options: Options of `Calibration`.
        """
        shard = self.lazy.shard(blocks)
        try:
            return OpenShard(self, shard, Calibration(shard, linears, self._task.side, **options))
        except BaseException:
            # the statistics of a large shard may not fit; a smaller one is opened then
            shard.close()
            raise


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard in memory, the model that it is part of, and the statistics gathered from it."""

    model: DenseModel
    shard: Shard
    calibration: Calibration

    @property
    def blocks(self) -> range:
        return self.shard.blocks

    def entering(self, worker: Worker, index: int, record: Emitted) -> Chunk:
        """Return a chunk at the shard's input: tokens, or the output of the shard before.

        Raises:
            MissingChunk: The output of the shard before is not available.
        """
        if self.shard.is_first:
            return self.model.first_chunk(index)
        chunk: Chunk = worker.input_chunk(self.blocks.start, index, record)
        return chunk

    def stored_inputs(self, chunks: Chunks, index: int) -> list[Stored]:
        """Return the stored chunks that `entering` reads; see `Worker.next_inputs`."""
        return [] if self.shard.is_first else [(chunks, self.blocks.start, index)]

    def settle(self) -> None:
        """Free memory that is not needed once all chunks have passed.

        For a 70B model: 2.1 GB of embeddings or head, and a third of the Grams.
        """
        self.calibration.flush_writes()
        self.shard.free_ends()

    def close(self) -> None:
        """Free the shard and its statistics."""
        self.calibration.close()
        self.shard.close()


class OpenPass(Protocol):
    """A pass of chunks through an open shard, as seen by the worker that holds the shard."""

    @property
    def opened(self) -> OpenShard: ...

    @property
    def chunks(self) -> Chunks:
        """Boundary chunks that the pass reads and writes."""
        ...

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one chunk through the shard; see `Worker.step`."""
        ...

    def next_inputs(self, index: int) -> list[Stored]:
        """Return the stored chunks that the step of this index reads; see `Worker`."""
        ...


class StatisticsPass:
    """A pass of chunks through a shard and into its statistics."""

    def __init__(self, worker: Worker, opened: OpenShard, chunks: Chunks) -> None:
        self._worker, self.opened, self.chunks = worker, opened, chunks

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        opened, worker = self.opened, self._worker
        passed = opened.calibration.forward(opened.entering(worker, index, record))
        return None, worker.emit(opened.blocks.stop, passed) if emit else None

    def next_inputs(self, index: int) -> list[Stored]:
        return self.opened.stored_inputs(self.chunks, index)
