"""Shard of a model that a worker trains as a part of a pipeline, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.device.malloc import free_device_memory, return_freed_memory
from orchestrator.device.transport import Departure
from orchestrator.models.shards.chunk import BlockState, Chunk, pack_many, split_record
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.distill import Losses, LossWeights, TopK, distill
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.pipeline.commands import PassCommand
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.open_shard import DenseModel, OpenShard
from orchestrator.store.chunks import MissingChunk, Record
from orchestrator.store.units import unit_key

SNAPSHOT_VERSION = 1
"""Raised when the same steps give another state."""
FILE = "state.safetensors"
TARGETS_FILE = "targets.safetensors"

Grads = Callable[[Tensor], Tensor]


def snapshot_key(key: str, step: int, block: int) -> str:
    """Return the key of a block's state after a step of the training of this key."""
    return unit_key("snapshot", SNAPSHOT_VERSION, [key], step=step, block=block)


class Trained(Protocol):
    """Trained numbers of a shard, with their gradients and moments, block by block."""

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks that have trained numbers."""
        ...

    @property
    def num_parameters(self) -> dict[int, int]:
        """Trained numbers of each block."""
        ...

    def check_room(self, free: int) -> None:
        """Raise InfeasibleError if `free` bytes of device memory are not enough."""
        ...

    def collect(self) -> None:
        """Convert the gradients of a backward pass to those of the trained numbers."""
        ...

    def norms(self) -> dict[int, float]:
        """Return the squared norms of the blocks' gradients."""
        ...

    def state(self, block: int) -> dict[str, Tensor]:
        """Return everything that a block's next step depends on, on the CPU."""
        ...

    def load(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore a block from the tensors of `state`."""
        ...


class PipelineSettings(Protocol):
    """Settings of the task of a worker with a `PipelineShard`."""

    @property
    def options(self) -> TrainOptions: ...

    @property
    def target_keys(self) -> tuple[str, ...]:
        """For each sequence the unit of the dense model's top-k; empty if there are none."""
        ...


T = TypeVar("T", bound=Trained)


@dataclass(slots=True)
class OpenTraining(Generic[T]):
    """A shard of the model that is trained."""

    model: Shard
    training: T
    entered: dict[int, list[Chunk]] = field(default_factory=dict)
    """Inputs of the shard's blocks, by pass between its forward and backward half."""


class PipelineShard(Generic[T]):
    """The shard that a worker of a pipeline holds: a dense one while targets are made, then one of
    the model that is trained. Its methods are the moves of the pipeline.

    Between the forward and the backward pass of a sequence it keeps the inputs of the shard's
    blocks, in their dtype (70B, 2048 tokens, float32: 67 MB a block). The backward pass recomputes
    one block at a time, from the last one, so that the activations of one block are in memory.

    Args:
        opened: Opens a shard of the model as it is before the first step.
        recomputes: True if the dense model runs alongside, in place of stored targets.
    """

    def __init__(
        self,
        worker: Worker,
        task: CompressionTask,
        dense: DenseModel,
        opened: Callable[[range], OpenTraining[T]],
        *,
        recomputes: bool = False,
    ) -> None:
        self._worker, self._dense, self._opened = worker, dense, opened
        self._pass_key, self.recomputes = task.pass_key, recomputes
        self._settings: PipelineSettings = task.settings
        self._dense_shard: OpenShard | None = None
        self._open_training: OpenTraining[T] | None = None

    @property
    def dense_shard(self) -> OpenShard:
        """The open shard of the dense model."""
        if self._dense_shard is None:
            raise RuntimeError("no dense shard is open; `open` or `take` comes first")
        return self._dense_shard

    @property
    def work(self) -> OpenTraining[T]:
        """The open shard of the model that is trained."""
        if self._open_training is None:
            raise RuntimeError("no shard is in training; `take` comes first")
        return self._open_training

    def perform(self, command: PassCommand, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a pass: it takes its input chunk and emits its own."""
        value, emitted = getattr(self, command.method)(**command.keywords(), record=record)
        return value, emitted

    def open(self, blocks: range) -> None:
        """Load a dense shard."""
        self.close()
        self._dense_shard = self._dense.open(blocks)

    def close(self) -> None:
        """Free both shards and all states."""
        if self._open_training is not None:
            self._open_training.model.close()
        self._open_training = None
        if self._dense_shard is not None:
            self._dense_shard.close()
        self._dense_shard = None
        return_freed_memory()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass a dense chunk on; after the last block its top-k is committed."""
        shard, chunk = (
            self.dense_shard.shard,
            self.dense_shard.entering(self._worker, index, record),
        )
        if not shard.is_last:
            passed = shard.forward(chunk)
            return None, self._worker.emit(shard.blocks.stop, passed) if emit else None
        settings, logits_BTV = self._settings, shard.logits(chunk)
        options = settings.options
        targets = TopK.of(logits_BTV, options.top_k, options.temperature)
        unit = self._worker.run.units.begin(settings.target_keys[index])
        with unit.file(TARGETS_FILE) as path:
            save_file(targets.tensors(), path)
        unit.commit(environment=self._worker.environment(), facts={})
        return None, None

    def next_inputs(self, index: int) -> list[Stored]:
        opened = self._dense_shard
        return opened.stored_inputs(self._worker.chunks, index) if opened is not None else []

    def take(self, blocks: range, step: int) -> dict[str, Any]:
        """Open a shard at the snapshot after a step; at step 0 it is as opened.

        Returns the number of trained values.

        Raises:
            InfeasibleError: The device's memory does not hold what training adds.
        """
        self.close()
        if self.recomputes:
            self._dense_shard = self._dense.open(blocks)
        self._open_training = self._opened(blocks)
        training = self._open_training.training
        if self._worker.device.type == "cuda":
            training.check_room(free_device_memory(self._worker.device))
        self.load_state(training, step)
        return {"numbers": training.num_parameters}

    def load_state(self, training: T, step: int) -> None:
        """Restore all blocks from the snapshot after a step; at step 0 they stay as they are."""
        for block in training.blocks if step else ():
            key = snapshot_key(self._pass_key, step, block)
            training.load(block, load_file(self._worker.run.units.file(key, FILE)))

    def forward(self, serial: int, sequence: int, record: Emitted) -> tuple[Any, Emitted]:
        """Pass a sequence on, and keep the inputs of the blocks for the backward pass."""
        streams = self._streams(serial, sequence, record)
        self.work.entered[serial], streams["model"] = self._through(streams["model"], 0)
        return None, self._record(streams)

    def turn(
        self,
        serial: int,
        sequence: int,
        *,
        divergence: float,
        cross_entropy: float,
        is_last: bool,
        record: Emitted,
    ) -> tuple[Any, Emitted]:
        """Pass a sequence to the end and back. Returns its losses."""
        streams = self._streams(serial, sequence, record)
        targets = self._targets(sequence, streams)
        entered, chunk = self._through(streams["model"], 1)
        weights = LossWeights(divergence=divergence, cross_entropy=cross_entropy)
        losses: list[Losses] = []

        def grads(logits_BTV: Tensor) -> Tensor:
            found, grad_BTV = self._distill(logits_BTV, chunk, targets, weights)
            losses.append(found)
            assert grad_BTV is not None
            return grad_BTV

        emitted = self._back(serial, [*entered, chunk], grads)
        return {"losses": losses[0].to_json()} | self._norms(is_last), emitted

    def backward(self, serial: int, is_last: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass the gradients of a sequence back through the blocks."""
        if record is None:
            raise MissingChunk(-self.work.model.blocks.stop, serial)
        payload = self._worker.unpack(record).payload
        assert payload is not None
        emitted = self._back(serial, self.work.entered.pop(serial), list(payload.output))
        return self._norms(is_last), emitted

    def evaluate(self, serial: int, sequence: int, record: Emitted) -> tuple[Any, Emitted]:
        """Pass a held-out sequence on; after the last block its losses are returned."""
        model = self.work.model
        streams = self._streams(serial, sequence, record)
        if not model.is_last:
            _, streams["model"] = self._through(streams["model"], 0)
            return None, self._record(streams)
        _, chunk = self._through(streams["model"], 1)
        logits_BTV = model.logits(chunk, part=model.blocks[-1:])
        losses, _ = self._distill(logits_BTV, chunk, self._targets(sequence, streams), None)
        return {"losses": losses.to_json()}, None

    def snapshot(self, step: int) -> None:
        """Commit the state of every block that is trained."""
        training = self.work.training
        for block in training.blocks:
            unit = self._worker.run.units.begin(snapshot_key(self._pass_key, step, block))
            with unit.file(FILE) as path:
                save_file(training.state(block), path)
            unit.commit(environment=self._worker.environment(), facts={})

    def _streams(self, serial: int, sequence: int, record: Emitted) -> dict[str, Chunk]:
        """Return the shard's inputs: those of its own model, and the dense ones if recomputed."""
        model = self.work.model
        names = ["model", "dense"] if self.recomputes else ["model"]
        if model.is_first:
            return dict.fromkeys(names, self._dense.first_chunk(sequence))
        if record is None:
            raise MissingChunk(model.blocks.start, serial)
        parts = split_record(record, names)
        return {name: self._worker.unpack(part) for name, part in parts.items()}

    def _record(self, streams: dict[str, Chunk]) -> Record:
        """Return the shard's output; the dense chunk passes through its own shard here."""
        if "dense" in streams:
            streams["dense"] = self.dense_shard.shard.forward(streams["dense"])
        departure = Departure()
        record = pack_many(streams, departure)
        departure.wait()
        return record

    def _targets(self, sequence: int, streams: Mapping[str, Chunk]) -> TopK | Tensor | None:
        """Return the dense model's logits of a sequence, or their top-k from the run directory;
        None if the loss needs neither."""
        if "dense" in streams:
            return self.dense_shard.shard.logits(streams["dense"])
        if not self._settings.target_keys:
            return None
        path = self._worker.run.units.file(self._settings.target_keys[sequence], TARGETS_FILE)
        return TopK.from_tensors(load_file(path)).to(self._worker.device)

    def _through(self, chunk: Chunk, but: int) -> tuple[list[Chunk], Chunk]:
        """Return the inputs of all blocks but the last `but`, and the output of these blocks."""
        model, entered = self.work.model, []
        for block in model.blocks[: len(model.blocks) - but]:
            entered.append(chunk)
            chunk = model.forward(chunk, part=range(block, block + 1))
        return entered, chunk

    def _back(
        self, serial: int, entered: list[Chunk], grads: list[Tensor | None] | Grads
    ) -> Emitted:
        """Pass gradients back through all blocks. Returns the record for the shard before."""
        model, training = self.work.model, self.work.training
        for block, chunk in zip(model.blocks[::-1], entered[::-1], strict=True):
            grads = model.backward(chunk, grads, part=range(block, block + 1))
            training.collect()
        assert isinstance(grads, list)
        if model.is_first:
            return None
        first = entered[0]
        return Chunk(serial, first.tokens, first.mask, BlockState(tuple(grads))).pack()

    def _distill(
        self,
        logits_BTV: Tensor,
        chunk: Chunk,
        targets: TopK | Tensor | None,
        weights: LossWeights | None,
    ) -> tuple[Losses, Tensor | None]:
        temperature = self._settings.options.temperature
        return distill(
            logits_BTV,
            chunk.tokens,
            chunk.mask,
            targets,
            temperature=temperature,
            weights=weights,
        )

    def _norms(self, is_last: bool) -> dict[str, Any]:
        return {"norms": self.work.training.norms()} if is_last else {}
