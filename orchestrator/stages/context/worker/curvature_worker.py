"""Backward pass of gradients through the shards, for the statistics that methods make of them.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from orchestrator.models.evaluation.scoring import draw_label_gradient, text_label_gradient
from orchestrator.models.shards.chunk import BlockState, Chunk
from orchestrator.randomness import Randomness
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.expert_group import WHOLE, ExpertGroup
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.context.worker.open_shard import OpenShard
from orchestrator.store.chunks import MissingChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSettings:
    """Settings of a backward pass of gradients."""

    gradients_key: str
    """Key of the pass of the gradients; that of the chunks is the `pass_key` of the task."""
    sequences: int
    """Chunk d sequences + s of the backward pass is draw d of labels for sequence s."""
    randomness: Randomness


@dataclass(frozen=True, slots=True)
class BackwardPass:
    """Request for the backward pass; the forward pass has left chunks at the shards' inputs."""

    group: ExpertGroup = WHOLE
    """Experts whose statistics are gathered."""

    def start(
        self, worker: CompressionWorker, blocks: range, todo: tuple[int, ...]
    ) -> "GradientPass":
        method = worker.task.method
        opened = worker.dense.open(
            blocks,
            worker.task.of_groups(todo),
            group=self.group,
            magnitudes=method.magnitudes,
            curvature=method.gradient == "curvature",
            gradient=None if method.gradient == "curvature" else method.gradient,
            outputs=worker.task.output_curvature,
        )
        opened.shard.freeze()
        return GradientPass(worker, opened)


class GradientPass:
    """Each shard is run forward again on its input, then backward, which gives the statistics."""

    def __init__(self, worker: CompressionWorker, opened: OpenShard) -> None:
        self._worker, self.opened = worker, opened
        self._settings: BackwardSettings = worker.task.settings
        self.chunks = worker.run.chunks(self._settings.gradients_key, worker.environment())

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass the gradients of one chunk back through the shard."""
        worker, opened = self._worker, self.opened
        chunk = self._dense_chunk(index % self._settings.sequences)
        if opened.shard.is_last:
            passed = opened.calibration.backward(chunk, partial(self._label_gradient, index, chunk))
        else:
            payload = worker.input_chunk(opened.blocks.stop, index, record).payload
            assert payload is not None
            passed = opened.calibration.backward(chunk, list(payload.output))
        gradients = Chunk(index, chunk.tokens, chunk.mask, BlockState(tuple(passed)))
        return None, worker.emit(opened.blocks.start, gradients) if emit else None

    def _label_gradient(self, index: int, chunk: Chunk, logits_BTV: Tensor) -> Tensor:
        """Return the gradient of the loss of a chunk with respect to its logits."""
        labels = self._worker.task.method.labels
        if labels == "drawn":
            # one stream of random numbers for each draw, on whichever worker
            generator = self._settings.randomness.labels(index, self._worker.device)
            return draw_label_gradient(logits_BTV, chunk.mask, generator)
        text_BT = chunk.mask if chunk.images is None else chunk.mask & ~chunk.images
        ahead = 1 if labels == "next" else 2
        return text_label_gradient(logits_BTV, chunk.tokens, text_BT, ahead=ahead)

    def _dense_chunk(self, sequence: int) -> Chunk:
        """Return the shard's input, as the forward pass has stored it.

        Raises:
            MissingChunk: It is missing or damaged.
        """
        worker, dense, start = self._worker, self._worker.dense_chunks, self.opened.blocks.start
        if start == 0:
            return worker.dense.first_chunk(sequence)
        chunk: Chunk | None = worker.take_coming(dense, start, sequence)
        if chunk is not None:
            return chunk
        record = dense.await_written(start, sequence)
        if record is None:
            dense.drop(start, sequence)
            raise MissingChunk(start, sequence)
        chunk = worker.unpack(record)
        assert chunk is not None
        return chunk

    def next_inputs(self, index: int) -> list[Stored]:
        opened, sequence = self.opened, index % self._settings.sequences
        dense = opened.stored_inputs(self._worker.dense_chunks, sequence)
        gradients = [] if opened.shard.is_last else [(self.chunks, opened.blocks.stop, index)]
        return dense + gradients
