"""The worker that walks a compressed model block by block, each behind the ones it has changed."""

import time
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from orchestrator.cluster.heap import return_freed_memory
from orchestrator.cluster.tokens import first_chunk
from orchestrator.cluster.trained_worker import TRAINED_FILE, TrainedTask, TrainedWorker
from orchestrator.models.chunk import Chunk
from orchestrator.models.compensation import block_error, compensate_block, restore
from orchestrator.models.compensation_options import CompensationOptions
from orchestrator.models.refine import refine
from orchestrator.models.refine_options import RefineOptions
from orchestrator.models.shard import Shard
from orchestrator.store.chunks import Chunks, MissingChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkTask(TrainedTask):
    """What is needed beside the compressed model."""

    compensation: CompensationOptions | None
    refinement: RefineOptions | None
    changed: frozenset[int]
    """Blocks with a linear that is cut; the others are gone through as they are."""
    dense_key: str
    """The pass of the dense model's chunks; that of the compressed model's is the `pass_key`."""
    sequences: int


class WalkWorker(TrainedWorker):
    """Two streams of chunks from block to block: the dense model's, and the compressed one's.

    Held beside a block of each: both streams of all sequences before the block and behind it (70B
    and 256 × 2048 tokens: 8.6 GB each in bfloat16, and twice that of the compressed one, which is
    float32), and what compensation or training take.
    """

    task: WalkTask

    def __init__(self, task: WalkTask) -> None:
        super().__init__(task)
        self._dense_chunks = self.run.chunks(task.dense_key, self.environment())
        self._left: tuple[int, list[Chunk], list[Chunk]] | None = None

    def walk(self, block: int) -> dict[str, Any]:
        """Makes one block, leaves the chunks behind it and commits its tensors; gives the facts.

        Raises:
            MissingChunk: What the block starts from does not lie there.
        """
        start, part = time.monotonic(), range(block, block + 1)
        with self.dense.shard(part) as dense, self.planned.shard(part) as shard:
            dense_inputs, inputs = self._before_block(block)
            targets = [dense.forward(chunk) for chunk in dense_inputs]
            facts: dict[str, Any] = {}
            tensors: dict[str, Tensor] = {}
            if block in self.task.changed:
                found = (shard.forward(chunk) for chunk in inputs)
                facts["before"] = block_error(list(found), targets)
                tensors = self._change(block, dense, shard, dense_inputs, inputs, targets, facts)
            passed = [shard.forward(chunk) for chunk in inputs]
            facts["after"] = block_error(passed, targets)
            self._leave(block + 1, targets, passed)
            facts["timings"] = {
                "seconds": time.monotonic() - start,
                "peak_bytes": self.peak_bytes(),
            }
            stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            self.commit_trained(block, stored, facts)
        return_freed_memory()
        return facts

    def follow(self, block: int) -> None:
        """Passes both streams through a block that is committed.

        Raises:
            MissingChunk: What the block starts from does not lie there.
        """
        part = range(block, block + 1)
        with self.dense.shard(part) as dense, self.planned.shard(part) as shard:
            dense_inputs, inputs = self._before_block(block)
            found = load_file(self.run.units.directory(self.task.keys[block]) / TRAINED_FILE)
            names = {disk: name for name, disk in self.planned.disk_names.items()}
            restore(shard, {names[disk]: tensor for disk, tensor in found.items()})
            targets = [dense.forward(chunk) for chunk in dense_inputs]
            self._leave(block + 1, targets, [shard.forward(chunk) for chunk in inputs])

    def _change(
        self,
        block: int,
        dense: Shard,
        shard: Shard,
        dense_inputs: list[Chunk],
        inputs: list[Chunk],
        targets: list[Chunk],
        facts: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Compensates and refines a block in place; the tensors that are others now, by name."""
        task, tensors = self.task, dict[str, Tensor]()
        if task.compensation is not None:
            linears = [each for each in task.linears if each.block == block]
            tensors, facts["linears"] = compensate_block(
                dense, shard, dense_inputs, inputs, linears, task.compensation
            )
        if task.refinement is not None:
            refined = refine(shard, inputs, targets, task.refinement, task.seed)
            facts["refinement"] = refined.facts()
            tensors |= refined.tensors
        return tensors

    def _before_block(self, block: int) -> tuple[list[Chunk], list[Chunk]]:
        """Both streams at a block's input: what this worker has left there, else the files."""
        if self._left is not None and self._left[0] == block:
            return self._left[1:]
        indices = range(self.task.sequences)
        if block == 0:
            assert self._tokens is not None
            first = [first_chunk(self._tokens, index) for index in indices]
            return first, first
        stores = self._dense_chunks, self.chunks
        dense, compressed = ([_read(store, block, index) for index in indices] for store in stores)
        return dense, compressed

    def _leave(self, boundary: int, dense: list[Chunk], compressed: list[Chunk]) -> None:
        """Stores both streams before a block, and keeps them; nothing behind the last one."""
        self._left = None
        if boundary in self.task.keys:
            self._left = boundary, dense, compressed
            for chunk, other in zip(dense, compressed, strict=True):
                self._dense_chunks.write(boundary, chunk.index, chunk.pack())
                self.chunks.write(boundary, other.index, other.pack())


def _read(store: Chunks, boundary: int, index: int) -> Chunk:
    record = store.read(boundary, index)
    if record is None:
        raise MissingChunk(boundary, index)
    return Chunk.unpack(record)
