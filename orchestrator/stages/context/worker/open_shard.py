"""The dense model on a worker, one shard at a time, and passes of chunks through a shard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.activations import ActivationCalibration
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.expert_outputs import OutputsCalibration
from orchestrator.models.statistics.input_means import MeansCalibration
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.expert_group import WHOLE, ExpertGroup
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

    def open(
        self,
        blocks: range,
        linears: Sequence[Linear] = (),
        *,
        group: ExpertGroup = WHOLE,
        **options: Any,
    ) -> "OpenShard":
        """Load a shard, with empty statistics of these linears.

        Args:
            group: Experts whose statistics are gathered.
            options: Options of `Calibration`.
        """
        task, tokens, kind = self._task, self.tokens.ids.size, Calibration
        options |= {"tokens": tokens, "block_cosines": task.block_cosines}
        if task.method.expert_outputs:
            kind = OutputsCalibration
        elif task.method.expert_activations:
            kind = ActivationCalibration
        elif task.method.input_means:
            kind = MeansCalibration
        chosen = group.linears(linears, task.grouping)
        opened = self.open_with(blocks, lambda shard: kind(shard, chosen, task.side, **options))
        return replace(opened, group=group)

    def open_with(self, blocks: range, calibrate: Callable[[Shard], Calibration]) -> "OpenShard":
        """Load a shard, with the statistics that a function makes of it."""
        shard = self.lazy.shard(blocks)
        try:
            return OpenShard(self, shard, calibrate(shard))
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
    group: ExpertGroup = WHOLE
    """Experts whose statistics are gathered."""

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
        self.calibration.flush_writes(pools=self.group.count == 1)
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


class PassSlot:
    """The pass of a worker that holds one shard at a time; empty at first."""

    def __init__(self) -> None:
        self._pass: OpenPass | None = None

    @property
    def current(self) -> OpenPass:
        """The pass through the open shard."""
        if self._pass is None:
            raise RuntimeError("no shard is open; `open` comes before `step` and `finish`")
        return self._pass

    def put(self, open_pass: OpenPass) -> None:
        """Hold a pass; the slot must be empty, so that no two shards are in memory."""
        assert self._pass is None
        self._pass = open_pass

    def next_inputs(self, index: int) -> list[Stored]:
        """Return the stored chunks of a step of the pass; none if the slot is empty."""
        return self._pass.next_inputs(index) if self._pass is not None else []

    def close(self) -> None:
        """Free the shard and its statistics."""
        if self._pass is not None:
            self._pass.opened.close()
        self._pass = None
        return_freed_memory()


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
