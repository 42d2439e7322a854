"""The worker that trains compressed blocks, each towards what its dense block gives."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.cluster.compress_worker import CompressionTask, CompressionWorker
from orchestrator.cluster.heap import return_freed_memory
from orchestrator.cluster.score_worker import ScoreWorker
from orchestrator.cluster.worker import Emitted
from orchestrator.models.chunk import Chunk
from orchestrator.models.layout import TensorSpec
from orchestrator.models.refine import refine
from orchestrator.models.refine_options import RefineOptions
from orchestrator.models.skeleton import Skeleton
from orchestrator.plan import Plan

REFINED_FILE = "refined.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineTask(CompressionTask):
    """What is needed beside what compression needs."""

    plan: Plan
    options: RefineOptions
    seed: int
    choice: str
    """Unit that says what of every linear is kept, where a prefix does not; or nothing."""
    refine_keys: Mapping[int, str]
    """The key of the unit of trained tensors, by block."""


class RefineWorker(ScoreWorker):
    """Passes chunks through a dense shard, keeps what enters each of its blocks, trains them.

    Held beside a shard: its blocks' dense inputs and outputs of all sequences (70B and 256 × 2048
    tokens: 8.6 GB a boundary, one more than the shard has blocks), and what training takes.
    """

    task: RefineTask

    def __init__(self, task: RefineTask) -> None:
        super().__init__(task)
        self._choice = task.choice
        self._planned: Skeleton | None = None
        self._states: dict[int, list[Chunk]] = {}
        self._owner: Mapping[str, int] | None = None

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Loads a dense shard."""
        super().open(blocks, ())
        self._states = {block: [] for block in range(blocks[0], blocks[1] + 1)}

    def close(self) -> None:
        """Frees the shard and what was kept of it."""
        self._states = {}
        super().close()

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
        planned = self._planned_model()
        with planned.shard(range(block, block + 1)) as shard:
            inputs, targets = map(_in_float32, (self._states[block], self._states[block + 1]))
            refined = refine(shard, inputs, targets, self.task.options, self.task.seed)
        disk_names = planned.disk_names
        # of tied tensors only one is stored; a copy each, since a file shares no memory
        tensors = {
            disk_names[name]: tensor.clone()
            for name, tensor in refined.tensors.items()
            if name in disk_names
        }
        unit = self.run.units.begin(self.task.refine_keys[block])
        with unit.file(REFINED_FILE) as path:
            save_file(tensors, path)
        timings = {"seconds": time.monotonic() - start, "peak_bytes": self.peak_bytes()}
        facts = refined.facts() | {"timings": timings}
        unit.commit(environment=self.environment(), facts=facts)
        return_freed_memory()
        return facts

    def _planned_model(self) -> Skeleton:
        """The compressed model before it is written; factors are not rounded to its dtype."""
        assert self._skeleton is not None
        if self._planned is None:
            self._planned = self._skeleton.planned(
                self.task.plan, self._unrefined, output_dtype=torch.float32, dtype=torch.float32
            )
        return self._planned

    def _unrefined(self, tensor: TensorSpec) -> Tensor:
        """What would be written without training."""
        if self.task.choice:
            return super()._read(tensor)
        return CompressionWorker._read(self, tensor)

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Writes one file of the checkpoint, with trained tensors where there are some."""
        return super().write(file, choice) if choice else CompressionWorker.write(self, file)

    def _read(self, tensor: TensorSpec) -> Tensor:
        if self._owner is None:
            self._owner = {
                name: block for block in self.task.refine_keys for name in self._trained(block)
            }
        if tensor.name not in self._owner:
            return self._unrefined(tensor)
        with safe_open(self._refined_path(self._owner[tensor.name]), framework="pt") as file:
            trained: Tensor = file.get_tensor(tensor.name)
        return trained

    def _trained(self, block: int) -> list[str]:
        with safe_open(self._refined_path(block), framework="pt") as file:
            return list(file.keys())

    def _refined_path(self, block: int) -> Path:
        return self.run.units.directory(self.task.refine_keys[block]) / REFINED_FILE


def _in_float32(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks in the precision that blocks are trained in."""

    def widen(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    return [chunk.with_payload(chunk.payload and chunk.payload.map(widen)) for chunk in chunks]
