"""The worker of a pipeline that trains: a shard of the compressed model, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.device.malloc import free_device_memory, return_freed_memory
from orchestrator.device.transport import Departure
from orchestrator.models.checkpoint.weights import Checkpoint
from orchestrator.models.shards.chunk import BlockState, Chunk, pack_many, split_record
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.distill import Losses, LossWeights, TopK, distill
from orchestrator.models.training.train import Training
from orchestrator.models.training.train_options import TrainOptions
from orchestrator.runtime.calls import Command
from orchestrator.runtime.worker import Emitted
from orchestrator.stages.context.tokens import first_chunk
from orchestrator.stages.context.trained_worker import TRAINED_FILE, TrainedTask, TrainedWorker
from orchestrator.stages.train.commands import PassCommand
from orchestrator.store.chunks import MissingChunk, Record
from orchestrator.store.units import unit_key

SNAPSHOT_VERSION = 1
"""Raised when the same steps leave another state."""
FILE = "state.safetensors"
TARGETS_FILE = "targets.safetensors"

Grads = Callable[[Tensor], Tensor]


def snapshot_key(key: str, step: int, block: int) -> str:
    """The unit of a block's state after a step of the training of this key."""
    return unit_key("snapshot", SNAPSHOT_VERSION, [key], step=step, block=block)


def best_key(key: str, block: int) -> str:
    """Unit of a block's values at the best step so far, if states are not stored."""
    return unit_key("best", SNAPSHOT_VERSION, [key], block=block)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTask(TrainedTask):
    """What is needed beside the compressed model."""

    options: TrainOptions
    mode: str
    target_keys: tuple[str, ...]
    """For each sequence the unit of the dense model's top-k; none where it is recomputed."""


class TrainWorker(TrainedWorker):
    """Holds a dense shard while targets are made, then a shard of the compressed model.

    Of each micro-batch that is on its way it keeps what enters each of its blocks, in float32 (70B
    and 2048 tokens: 67 MB a block). On the way back every block is run again, with gradients, and
    gone back through before the one in front of it: the activations of one block are in memory.
    """

    task: TrainTask

    def __init__(self, task: TrainTask) -> None:
        super().__init__(task)
        self._model: Shard | None = None
        self._training: Training | None = None
        self._entered: dict[int, list[Chunk]] = {}

    def perform(self, command: Command, record: Emitted) -> tuple[Any, Emitted]:
        """Execute a command; a pass of the pipeline takes its input chunk and emits its own."""
        if isinstance(command, PassCommand):
            value, emitted = getattr(self, command.method)(**command.keywords(), record=record)
            return value, emitted
        return super().perform(command, record)

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Loads a dense shard."""
        super().open(blocks, ())

    def close(self) -> None:
        """Frees the shards and all that was kept of them."""
        if self._model is not None:
            self._model.close()
        self._model = self._training = None
        self._entered = {}
        super().close()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes a dense chunk on; behind the last block its top-k is committed."""
        assert self._shard is not None
        if not self._shard.is_last:
            return super().step(index, emit, record)
        task, logits_BTV = self.task, self._shard.logits(self.entering(index, record))
        targets = TopK.of(logits_BTV, task.options.top_k, task.options.temperature)
        unit = self.run.units.begin(task.target_keys[index])
        with unit.file(TARGETS_FILE) as path:
            save_file(targets.tensors(), path)
        unit.commit(environment=self.environment(), facts={})
        return None, None

    def take(self, blocks: tuple[int, int], step: int) -> dict[str, Any]:
        """Takes a shard up from the snapshot after a step; after none it is as it was planned.

        Gives how many numbers are trained.

        Raises:
            InfeasibleError: The device's memory does not hold what training adds.
        """
        self.close()
        if not self.task.target_keys:
            super().open(blocks, ())
        self._model, self._training = self._planned_shard(range(*blocks))
        if self.device.type == "cuda":
            self._training.check_room(free_device_memory(self.device))
        self._load_state(self._training, step)
        return {"numbers": self._training.num_parameters}

    def _planned_shard(self, blocks: range) -> tuple[Shard, Training]:
        model = self.planned.shard(blocks)
        training = Training(
            model,
            self.task.keys.keys(),
            self.planned.disk_names.keys(),
            mode=self.task.mode,
            weight_decay=self.task.options.weight_decay,
        )
        return model, training

    def _load_state(self, training: Training, step: int) -> None:
        for block in training.blocks if step else ():
            key = snapshot_key(self.task.pass_key, step, block)
            training.load(block, load_file(self.run.units.file(key, FILE)))

    def forward(self, serial: int, sequence: int, record: Emitted) -> tuple[Any, Emitted]:
        """Passes a micro-batch on, and keeps what it takes to come back."""
        streams = self._streams(serial, sequence, record)
        self._entered[serial], streams["model"] = self._through(streams["model"], 0)
        return None, self._record(streams)

    def turn(
        self,
        serial: int,
        sequence: int,
        divergence: float,
        cross_entropy: float,
        is_last: bool,
        record: Emitted,
    ) -> tuple[Any, Emitted]:
        """Passes a micro-batch to the end and back, and gives its losses."""
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
        """Passes a micro-batch's gradients back through what was kept of it."""
        assert self._model is not None
        if record is None:
            raise MissingChunk(-self._model.blocks.stop, serial)
        payload = self.unpack(record).payload
        assert payload is not None
        emitted = self._back(serial, self._entered.pop(serial), list(payload.output))
        return self._norms(is_last), emitted

    def evaluate(self, serial: int, sequence: int, record: Emitted) -> tuple[Any, Emitted]:
        """Passes a held-out sequence on; behind the last block it gives its losses."""
        assert self._model is not None
        streams = self._streams(serial, sequence, record)
        if not self._model.is_last:
            _, streams["model"] = self._through(streams["model"], 0)
            return None, self._record(streams)
        _, chunk = self._through(streams["model"], 1)
        last = self._model.blocks[-1:]
        logits_BTV = self._model.logits(chunk, part=last)
        losses, _ = self._distill(logits_BTV, chunk, self._targets(sequence, streams), None)
        return {"losses": losses.to_json()}, None

    def update(self, step: int, scale: float, rate: float) -> None:
        """One step of the optimiser."""
        assert self._training is not None
        self._training.update(step, scale, rate)

    def snapshot(self, step: int) -> None:
        """Commits the state of every block that is trained."""
        assert self._training is not None
        for block in self._training.blocks:
            unit = self.run.units.begin(snapshot_key(self.task.pass_key, step, block))
            with unit.file(FILE) as path:
                save_file(self._training.state(block), path)
            unit.commit(environment=self.environment(), facts={})

    def keep(self, step: int, is_best: bool) -> None:
        """Commits the values of every block in place of earlier ones, if the step is the best."""
        assert self._training is not None
        assert self._model is not None
        if not is_best:
            return
        for block in sorted(self.task.keys.keys() & set(self._model.blocks)):
            key = best_key(self.task.pass_key, block)
            self.run.units.drop(key)
            self.commit_stored(key, self._outcome(self._training, block), {"step": step})

    def commit(
        self, blocks: tuple[int, int], step: int, facts: dict[str, Any], is_kept: bool
    ) -> None:
        """Commits the parameters at the best step of blocks that no cut separates.

        Args:
            is_kept: Whether `keep` has committed the values; else they are those of a state, or of
                the plan.
        """
        self.close()
        wanted = sorted(self.task.keys.keys() & set(range(*blocks)))
        if is_kept:
            for block in wanted:
                path = self.run.units.file(best_key(self.task.pass_key, block), TRAINED_FILE)
                self.commit_stored(self.task.keys[block], load_file(path), facts)
            return
        model, training = self._planned_shard(range(*blocks))
        with model:
            self._load_state(training, step)
            for block in wanted:
                self.commit_stored(self.task.keys[block], self._outcome(training, block), facts)
        return_freed_memory()

    def _outcome(self, training: Training, block: int) -> dict[str, Tensor]:
        """Trained parameters of a block in the dtypes of the output; no later stage trains them."""
        dtypes = self._as_written.dtype
        stored = self.stored(training.tensors(block))
        return {name: tensor.to(dtypes(name)) for name, tensor in stored.items()}

    @cached_property
    def _as_written(self) -> Checkpoint:
        """The compressed model with the dtypes of the output."""
        task = self.task
        return self.dense.planned(task.plan, self._before, output_dtype=task.output_dtype).weights

    def _streams(self, serial: int, sequence: int, record: Emitted) -> dict[str, Chunk]:
        """What enters the shard: the compressed model's chunk, and the dense one's if it passes."""
        assert self._model is not None
        assert self._tokens is not None
        names = ["model"] if self.task.target_keys else ["model", "dense"]
        if self._model.is_first:
            return dict.fromkeys(names, first_chunk(self._tokens, sequence))
        if record is None:
            raise MissingChunk(self._model.blocks.start, serial)
        parts = split_record(record, names)
        return {name: self.unpack(part) for name, part in parts.items()}

    def _record(self, streams: dict[str, Chunk]) -> Record:
        """What leaves the shard; the dense chunk passes its own shard here."""
        if "dense" in streams:
            assert self._shard is not None
            streams["dense"] = self._shard.forward(streams["dense"])
        departure = Departure()
        record = pack_many(streams, departure)
        departure.wait()
        return record

    def _targets(self, sequence: int, streams: Mapping[str, Chunk]) -> TopK | Tensor:
        """What the dense model says of a sequence, at its last shard or in the run directory."""
        if "dense" in streams:
            assert self._shard is not None
            return self._shard.logits(streams["dense"])
        path = self.run.units.file(self.task.target_keys[sequence], TARGETS_FILE)
        return TopK.from_tensors(load_file(path)).to(self.device)

    def _through(self, chunk: Chunk, but: int) -> tuple[list[Chunk], Chunk]:
        """What enters each block but the last so many, and what then comes."""
        assert self._model is not None
        entered = []
        for block in self._model.blocks[: len(self._model.blocks) - but]:
            entered.append(chunk)
            chunk = self._model.forward(chunk, part=range(block, block + 1))
        return entered, chunk

    def _back(
        self, serial: int, entered: list[Chunk], grads: list[Tensor | None] | Grads
    ) -> Emitted:
        """Gradients through all blocks, the last one first; what goes to the shard before."""
        assert self._model is not None
        assert self._training is not None
        for block, chunk in zip(self._model.blocks[::-1], entered[::-1], strict=True):
            grads = self._model.backward(chunk, grads, part=range(block, block + 1))
            self._training.collect()
        assert isinstance(grads, list)
        if self._model.is_first:
            return None
        first = entered[0]
        return Chunk(serial, first.tokens, first.mask, BlockState(tuple(grads))).pack()

    def _distill(
        self, logits_BTV: Tensor, chunk: Chunk, targets: TopK | Tensor, weights: LossWeights | None
    ) -> tuple[Losses, Tensor | None]:
        temperature = self.task.options.temperature
        return distill(
            logits_BTV,
            chunk.tokens,
            chunk.mask,
            targets,
            temperature=temperature,
            weights=weights,
        )

    def _norms(self, is_last: bool) -> dict[str, Any]:
        assert self._training is not None
        return {"norms": self._training.norms()} if is_last else {}
