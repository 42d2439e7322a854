"""The worker that passes chunks forward and gradients back: Grams, curvature, decompositions.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.evaluation.scoring import draw_label_gradient
from orchestrator.models.shards.chunk import Chunk, Payload
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.compress_worker import CompressionTask, CompressionWorker
from orchestrator.stages.context.tokens import first_chunk
from orchestrator.store.chunks import MissingChunk

LARGEST_PRIME = 2**63 - 25
"""Below 2^63: torch takes no larger seed, and modulo a power of two many would be one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvatureTask(CompressionTask):
    """What is needed beside what compression needs."""

    gradients_key: str
    """The pass in which gradients flow back; that in which chunks flow is the `pass_key`."""
    sequences: int
    """Chunk d sequences + s of the backward pass is draw d of labels for sequence s."""
    seed: int


class CurvatureWorker(CompressionWorker):
    """A shard that is run forward for the boundaries alone, then again and back for statistics."""

    task: CurvatureTask

    def __init__(self, task: CurvatureTask) -> None:
        super().__init__(task)
        self._dense = self.chunks
        self._gradients = self.run.chunks(task.gradients_key, self.environment())
        self._is_backward = False

    def open(
        self, blocks: tuple[int, int], todo: tuple[int, ...], is_backward: bool = False
    ) -> None:
        """Loads a shard for one of the two passes."""
        self._is_backward = is_backward
        self.chunks = self._gradients if is_backward else self._dense
        super().open(blocks, todo)

    def _gather(self, shard: Shard, todo: tuple[int, ...]) -> Calibration:
        if not self._is_backward:
            return super()._gather(shard, todo)
        shard.freeze()
        return Calibration(
            shard,
            self._wanted(todo),
            self._side,
            magnitudes=self.method.magnitudes,
            curvature=True,
            outputs=self.method.bends_outputs,
        )

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one chunk on, or one chunk's gradients back through the shard."""
        if not self._is_backward:
            return super().step(index, emit, record)
        assert self._shard is not None
        assert self._calibration is not None
        chunk = self._dense_chunk(index % self.task.sequences)
        if self._shard.is_last:
            # one stream of random numbers for each draw, whoever makes it
            seed = (self.task.seed * 2**24 + index) % LARGEST_PRIME
            generator = torch.Generator(self.device).manual_seed(seed)

            def grads(logits_BTV: Tensor) -> Tensor:
                return draw_label_gradient(logits_BTV, chunk.mask, generator)

            passed = self._calibration.backward(chunk, grads)
        else:
            payload = self.input_chunk(self._shard.blocks.stop, index, record).payload
            assert payload is not None
            passed = self._calibration.backward(chunk, list(payload.output))
        gradients = Chunk(index, chunk.tokens, chunk.mask, Payload(tuple(passed)))
        return None, self.emit(self._shard.blocks.start, gradients) if emit else None

    def _dense_chunk(self, sequence: int) -> Chunk:
        """What enters the shard, as the dense model's earlier blocks have left it.

        Raises:
            MissingChunk: That is not there, or damaged.
        """
        assert self._shard is not None
        assert self._tokens is not None
        start = self._shard.blocks.start
        if start == 0:
            return first_chunk(self._tokens, sequence)
        coming: Chunk | None = self.take_coming(self._dense, start, sequence)
        if coming is not None:
            return coming
        record = self._dense.await_written(start, sequence)
        if record is None:
            self._dense.drop(start, sequence)
            raise MissingChunk(start, sequence)
        chunk: Chunk = self.unpack(record)
        return chunk

    def next_inputs(self, index: int) -> list[Stored]:
        if not self._is_backward or self._shard is None:
            return super().next_inputs(index)
        blocks, sequence = self._shard.blocks, index % self.task.sequences
        dense = [] if self._shard.is_first else [(self._dense, blocks.start, sequence)]
        gradients = [] if self._shard.is_last else [(self.chunks, blocks.stop, index)]
        return dense + gradients
