"""Worker that trains compressed blocks, each towards the outputs of its dense block."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.training.refine import refine
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import TrainedUnits
from orchestrator.stages.context.worker.open_shard import DenseModel, OpenShard
from orchestrator.stages.context.worker.trained_worker import CompressedModel
from orchestrator.store.chunks import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """Settings of the training of blocks in parallel."""

    units: TrainedUnits
    options: RefineOptions


class RefineWorker(Worker):
    """Passes chunks through a dense shard, keeps the inputs of its blocks, and trains the blocks.

    Memory beside a shard: its blocks' dense inputs and outputs of all sequences (70B and 256 × 2048
    tokens: 8.6 GB a boundary, one more than the shard has blocks), and the memory of training.
    """

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=_pageable, fingerprint=fingerprint_of)
        self.task = task
        self.settings: RefineSettings = task.settings
        self.dense = DenseModel(task, self.run, self.device)
        self.compressed = CompressedModel(self, task, self.dense, self.settings.units)
        self._opened: OpenShard | None = None
        self._states: dict[int, list[Chunk]] = {}

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Load a dense shard."""
        self.close()
        self._opened = self.dense.open(range(*blocks))
        self._states = {block: [] for block in range(blocks[0], blocks[1] + 1)}

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the dense weights of later blocks into the system's cache."""
        self.dense.lazy.read_ahead(blocks)

    def close(self) -> None:
        """Free the shard and the states of its blocks."""
        self._states = {}
        if self._opened is not None:
            self._opened.close()
        self._opened = None
        return_freed_memory()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one chunk through the shard, block by block."""
        assert self._opened is not None
        shard, chunk = self._opened.shard, self._opened.entering(self, index, record)
        for block in shard.blocks:
            self._states[block].append(chunk)
            chunk = shard.forward(chunk, part=range(block, block + 1))
        self._states[shard.blocks.stop].append(chunk)
        return None, self.emit(shard.blocks.stop, chunk) if emit else None

    def next_inputs(self, index: int) -> list[Stored]:
        return self._opened.stored_inputs(self.chunks, index) if self._opened is not None else []

    def finish(self, block: int) -> dict[str, Any]:
        """Train one block and commit its tensors. Returns the unit's facts: losses, seconds."""
        start = time.monotonic()
        with self.compressed.planned.shard(range(block, block + 1)) as shard:
            inputs, targets = self._states[block], self._states[block + 1]
            options, randomness = self.settings.options, self.settings.units.randomness
            refined = refine(shard, inputs, targets, options=options, randomness=randomness)
            tensors = {**refined.tensors, **self.compressed.indices(shard)}
        timings = {"seconds": time.monotonic() - start, "memory": self.usage().to_json()}
        facts = refined.facts() | {"timings": timings}
        self.compressed.commit_block(block, tensors, facts)
        return_freed_memory()
        return facts

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint, with the trained tensors of its blocks."""
        return self.compressed.after.write(file, self.task.out)


def _pageable(record: Record, /, *, pinned: bool) -> Chunk:
    """Unpack to pageable memory: a shard keeps all chunks, too many to be pinned."""
    return Chunk.unpack(record)
