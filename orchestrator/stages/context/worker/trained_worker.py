"""The compressed model on a worker, as earlier stages have left it, and a stage's trained units."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.models.checkpoint.weights import Checkpoint
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.trained_units import TrainedUnits
from orchestrator.stages.context.worker.compress_worker import planned_tensors
from orchestrator.stages.context.worker.open_shard import DenseModel
from orchestrator.stages.context.worker.stored import Decompositions, StoredTensors
from orchestrator.store.run import RunDirectory

TRAINED_FILE = "trained.safetensors"


class TrainedTensors:
    """Source of trained tensors: the units of some stages, the last stage first."""

    def __init__(self, run: RunDirectory, stages: Sequence[Mapping[int, str]]) -> None:
        self._run, self._stages = run, stages
        self._names: dict[str, frozenset[str]] = {}

    def read(self, tensor: TensorSpec) -> Tensor | None:
        for keys in reversed(self._stages):
            for key in keys.values():
                if tensor.name in self._trained(key):
                    with safe_open(trained_path(self._run, key), framework="pt") as file:
                        trained: Tensor = file.get_tensor(tensor.name)
                    return trained
        return None

    def _trained(self, key: str) -> frozenset[str]:
        """Return the names on disk of a unit's tensors; a committed unit does not change."""
        if key not in self._names:
            with safe_open(trained_path(self._run, key), framework="pt") as file:
                self._names[key] = frozenset(file.keys())
        return self._names[key]


class CompressedModel:
    """The compressed model before a stage, and the trained units that the stage commits."""

    def __init__(
        self, worker: Worker, task: CompressionTask, dense: DenseModel, units: TrainedUnits
    ) -> None:
        self._worker, self._task, self._dense, self._units = worker, task, dense, units

    @cached_property
    def _as_planned(self) -> StoredTensors:
        """The tensors that no stage has trained."""
        worker, task = self._worker, self._task
        decompositions = Decompositions(task, worker.run, worker.device)
        return planned_tensors(decompositions, task, self._units.choice)

    def _after(self, stages: Sequence[Mapping[int, str]]) -> StoredTensors:
        """Return the tensors as these stages have left them."""
        trained = TrainedTensors(self._worker.run, stages)
        return replace(self._as_planned, sources=(trained, *self._as_planned.sources))

    @cached_property
    def before(self) -> StoredTensors:
        """The tensors of the compressed model before this stage."""
        return self._after(self._units.earlier)

    @cached_property
    def after(self) -> StoredTensors:
        """The tensors of the compressed model once this stage is complete."""
        return self._after((*self._units.earlier, self._units.keys))

    @cached_property
    def planned(self) -> LazyModel:
        """The compressed model before this stage; factors are not rounded to the output's dtype."""
        return self._dense.lazy.planned(
            self._units.plan, self.before.read, output_dtype=torch.float32, dtype=torch.float32
        )

    @cached_property
    def as_written(self) -> Checkpoint:
        """The compressed model before this stage, with the dtypes of the output."""
        plan, dtype = self._units.plan, self._task.output_dtype
        return self._dense.lazy.planned(plan, self.before.read, output_dtype=dtype).weights

    def indices(self, shard: Shard) -> dict[str, Tensor]:
        """Return the buffers that are stored with trained values, by name; training keeps them."""
        inside = (each.name for each in self._task.linears if each.block in shard.blocks)
        modules = {name: shard.module(name) for name in inside}
        return {
            f"{name}.{buffer}": module.get_buffer(buffer).cpu()
            for name, module in modules.items()
            if isinstance(module, FormLinear)
            for buffer in module.stored_with_values
        }

    def commit_block(
        self, block: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Commit the trained tensors of a block, given by their names in the model."""
        self.commit(self._units.keys[block], self.stored(tensors), facts)

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to store, by their names on disk."""
        disk_names = self.planned.disk_names
        # of tied tensors only one is stored; copies, since tensors of a file must not share memory
        return {
            disk_names[name]: tensor.clone()
            for name, tensor in tensors.items()
            if name in disk_names
        }

    def commit(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Commit a unit of tensors, given by their names on disk."""
        unit = self._worker.run.units.begin(key)
        with unit.file(TRAINED_FILE) as path:
            save_file(dict(tensors), path)
        unit.commit(environment=self._worker.environment(), facts=facts)

    def path(self, key: str) -> Path:
        """Return the file of a unit of trained tensors."""
        return trained_path(self._worker.run, key)


def trained_path(run: RunDirectory, key: str) -> Path:
    return run.units.file(key, TRAINED_FILE)
