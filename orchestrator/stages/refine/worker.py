"""The worker that trains compressed blocks, each towards what its dense block gives."""

import time
from dataclasses import dataclass
from typing import Any

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.training.refine import refine
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.worker import Emitted
from orchestrator.stages.context.trained_worker import TrainedTask, TrainedWorker
from orchestrator.store.chunks import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineTask(TrainedTask):
    """What is needed beside the compressed model."""

    options: RefineOptions


class RefineWorker(TrainedWorker):
    """Passes chunks through a dense shard, keeps what enters each of its blocks, trains them.

    Held beside a shard: its blocks' dense inputs and outputs of all sequences (70B and 256 × 2048
    tokens: 8.6 GB a boundary, one more than the shard has blocks), and what training takes.
    """

    task: RefineTask

    def __init__(self, task: RefineTask) -> None:
        super().__init__(task)
        self._states: dict[int, list[Chunk]] = {}

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Loads a dense shard."""
        super().open(blocks, ())
        self._states = {block: [] for block in range(blocks[0], blocks[1] + 1)}

    def close(self) -> None:
        """Frees the shard and what was kept of it."""
        self._states = {}
        super().close()

    def unpack(self, record: Record) -> Chunk:
        """A chunk in pageable memory: a shard keeps all of them, too many to be pinned."""
        return Chunk.unpack(record)

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one chunk through the shard, block by block."""
        assert self._shard is not None
        blocks, chunk = self._shard.blocks, self.entering(index, record)
        for block in blocks:
            self._states[block].append(chunk)
            chunk = self._shard.forward(chunk, part=range(block, block + 1))
        self._states[blocks.stop].append(chunk)
        return None, self.emit(blocks.stop, chunk) if emit else None

    def finish(self, block: int) -> dict[str, Any]:
        """Trains one block and commits its tensors; gives the unit's facts: losses, seconds."""
        start = time.monotonic()
        with self.planned.shard(range(block, block + 1)) as shard:
            inputs, targets = self._states[block], self._states[block + 1]
            refined = refine(shard, inputs, targets, options=self.task.options, seed=self.task.seed)
            tensors = {**refined.tensors, **self.indices(shard)}
        timings = {"seconds": time.monotonic() - start, "memory": self.usage().to_json()}
        facts = refined.facts() | {"timings": timings}
        self.commit_trained(block, tensors, facts)
        return_freed_memory()
        return facts
