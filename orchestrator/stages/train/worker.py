"""Worker of the training pipeline: a shard of the compressed model, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.device.malloc import free_device_memory, return_freed_memory
from orchestrator.device.transport import Departure
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import BlockState, Chunk, pack_many, split_record
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.distill import Losses, LossWeights, TopK, distill
from orchestrator.models.training.train import Training
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.runtime.calls import Command
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import TrainedUnits
from orchestrator.stages.context.worker.open_shard import DenseModel, OpenShard
from orchestrator.stages.context.worker.trained_worker import CompressedModel
from orchestrator.stages.train.commands import PassCommand
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


def best_key(key: str, block: int) -> str:
    """Return the key of a block's values at the best step so far, if states are not stored."""
    return unit_key("best", SNAPSHOT_VERSION, [key], block=block)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of the training of the whole compressed model."""

    units: TrainedUnits
    options: TrainOptions
    mode: str
    target_keys: tuple[str, ...]
    """For each sequence the unit of the dense model's top-k; none if they are recomputed."""


@dataclass(slots=True)
class OpenTraining:
    """A shard of the compressed model that is trained."""

    model: Shard
    training: Training
    entered: dict[int, list[Chunk]] = field(default_factory=dict)
    """Inputs of the shard's blocks, by pass between its forward and backward half."""


class TrainWorker(Worker):
    """Holds a dense shard while targets are made, then a shard of the compressed model.

    Between the forward and the backward pass of a sequence it keeps the inputs of the shard's
    blocks, in float32 (70B and 2048 tokens: 67 MB a block). The backward pass recomputes one block
    at a time, from the last one, so that the activations of one block are in memory.
    """

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.settings: TrainSettings = task.settings
        self.dense = DenseModel(task, self.run, self.device)
        self.compressed = CompressedModel(self, task, self.dense, self.settings.units)
        self._dense_shard: OpenShard | None = None
        self._open_training: OpenTraining | None = None

    @property
    def dense_shard(self) -> OpenShard:
        """The open shard of the dense model."""
        if self._dense_shard is None:
            raise RuntimeError("no dense shard is open; `open` or `take` comes first")
        return self._dense_shard

    @property
    def work(self) -> OpenTraining:
        """The open shard of the compressed model."""
        if self._open_training is None:
            raise RuntimeError("no shard is in training; `take` comes first")
        return self._open_training

    def perform(self, command: Command, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a command; a pass of the pipeline takes its input chunk and emits its own."""
        if isinstance(command, PassCommand):
            value, emitted = getattr(self, command.method)(**command.keywords(), record=record)
            return value, emitted
        return super().perform(command, record)

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Load a dense shard."""
        self.close()
        self._dense_shard = self.dense.open(range(*blocks))

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the dense weights of later blocks into the system's cache."""
        self.dense.lazy.read_ahead(blocks)

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
        shard, chunk = self.dense_shard.shard, self.dense_shard.entering(self, index, record)
        if not shard.is_last:
            passed = shard.forward(chunk)
            return None, self.emit(shard.blocks.stop, passed) if emit else None
        settings, logits_BTV = self.settings, shard.logits(chunk)
        options = settings.options
        targets = TopK.of(logits_BTV, options.top_k, options.temperature)
        unit = self.run.units.begin(settings.target_keys[index])
        with unit.file(TARGETS_FILE) as path:
            save_file(targets.tensors(), path)
        unit.commit(environment=self.environment(), facts={})
        return None, None

    def next_inputs(self, index: int) -> list[Stored]:
        opened = self._dense_shard
        return opened.stored_inputs(self.chunks, index) if opened is not None else []

    def take(self, blocks: tuple[int, int], step: int) -> dict[str, Any]:
        """Open a shard at the snapshot after a step; at step 0 it is as planned.

        Returns the number of trained values.

        Raises:
            InfeasibleError: The device's memory does not hold what training adds.
        """
        self.close()
        if not self.settings.target_keys:
            self._dense_shard = self.dense.open(range(*blocks))
        self._open_training = self._planned_shard(range(*blocks))
        training = self._open_training.training
        if self.device.type == "cuda":
            training.check_room(free_device_memory(self.device))
        self._load_state(training, step)
        return {"numbers": training.num_parameters}

    def _planned_shard(self, blocks: range) -> OpenTraining:
        planned = self.compressed.planned
        model = planned.shard(blocks)
        training = Training(
            model,
            self.settings.units.keys.keys(),
            planned.disk_names.keys(),
            mode=self.settings.mode,
            weight_decay=self.settings.options.weight_decay,
        )
        return OpenTraining(model, training)

    def _load_state(self, training: Training, step: int) -> None:
        for block in training.blocks if step else ():
            key = snapshot_key(self.task.pass_key, step, block)
            training.load(block, load_file(self.run.units.file(key, FILE)))

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
        payload = self.unpack(record).payload
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

    def update(self, step: int, scale: float, rate: float) -> None:
        """Make one step of the optimiser."""
        self.work.training.update(step, scale, rate)

    def snapshot(self, step: int) -> None:
        """Commit the state of every block that is trained."""
        training = self.work.training
        for block in training.blocks:
            unit = self.run.units.begin(snapshot_key(self.task.pass_key, step, block))
            with unit.file(FILE) as path:
                save_file(training.state(block), path)
            unit.commit(environment=self.environment(), facts={})

    def keep(self, step: int, is_best: bool) -> None:
        """Commit the values of every block in place of earlier ones, if the step is the best."""
        if not is_best:
            return
        for block in sorted(self.settings.units.keys.keys() & set(self.work.model.blocks)):
            key = best_key(self.task.pass_key, block)
            self.run.units.drop(key)
            self.compressed.commit(key, self._outcome(self.work.training, block), {"step": step})

    def commit(
        self, blocks: tuple[int, int], step: int, facts: dict[str, Any], is_kept: bool
    ) -> None:
        """Commit the parameters at the best step of blocks that no cut separates.

        Args:
            is_kept: True if `keep` has committed the values; otherwise they are those of a state,
                or of the plan.
        """
        self.close()
        wanted = sorted(self.settings.units.keys.keys() & set(range(*blocks)))
        if is_kept:
            for block in wanted:
                best = load_file(self.compressed.path(best_key(self.task.pass_key, block)))
                self.compressed.commit(self.settings.units.keys[block], best, facts)
            return
        work = self._planned_shard(range(*blocks))
        with work.model:
            self._load_state(work.training, step)
            for block in wanted:
                outcome = self._outcome(work.training, block)
                self.compressed.commit(self.settings.units.keys[block], outcome, facts)
        return_freed_memory()

    def _outcome(self, training: Training, block: int) -> dict[str, Tensor]:
        """Return the trained tensors of a block in the dtypes of the output; no stage follows."""
        dtypes = self.compressed.as_written.dtype
        stored = self.compressed.stored(training.tensors(block))
        return {name: tensor.to(dtypes(name)) for name, tensor in stored.items()}

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint, with the trained tensors."""
        return self.compressed.after.write(file, self.task.out)

    def _streams(self, serial: int, sequence: int, record: Emitted) -> dict[str, Chunk]:
        """Return the shard's inputs: the compressed model's, and the dense one's if recomputed."""
        model = self.work.model
        names = ["model"] if self.settings.target_keys else ["model", "dense"]
        if model.is_first:
            return dict.fromkeys(names, self.dense.first_chunk(sequence))
        if record is None:
            raise MissingChunk(model.blocks.start, serial)
        parts = split_record(record, names)
        return {name: self.unpack(part) for name, part in parts.items()}

    def _record(self, streams: dict[str, Chunk]) -> Record:
        """Return the shard's output; the dense chunk passes through its own shard here."""
        if "dense" in streams:
            streams["dense"] = self.dense_shard.shard.forward(streams["dense"])
        departure = Departure()
        record = pack_many(streams, departure)
        departure.wait()
        return record

    def _targets(self, sequence: int, streams: Mapping[str, Chunk]) -> TopK | Tensor:
        """Return the dense model's logits of a sequence, or their top-k from the run directory."""
        if "dense" in streams:
            return self.dense_shard.shard.logits(streams["dense"])
        path = self.run.units.file(self.settings.target_keys[sequence], TARGETS_FILE)
        return TopK.from_tensors(load_file(path)).to(self.device)

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
        self, logits_BTV: Tensor, chunk: Chunk, targets: TopK | Tensor, weights: LossWeights | None
    ) -> tuple[Losses, Tensor | None]:
        temperature = self.settings.options.temperature
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
