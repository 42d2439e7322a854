"""The worker of what follows the plan: the compressed model as earlier stages have left it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.plan.plan import Plan
from orchestrator.stages.context.compress_worker import CompressionTask, CompressionWorker
from orchestrator.stages.score_masks.worker import ScoreWorker

TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTask(CompressionTask):
    """What is needed beside what compression needs."""

    plan: Plan
    seed: int
    choice: str
    """Unit that says what of every linear is kept, where a prefix does not; or nothing."""
    earlier: tuple[Mapping[int, str], ...]
    """Units of trained tensors, by block, that the stages before have made; the last one wins."""
    keys: Mapping[int, str]
    """The units that this stage makes."""


class TrainedWorker(ScoreWorker):
    """Reads a tensor where the last stage that trained it has left it, else as the plan cuts it."""

    task: TrainedTask

    def __init__(self, task: TrainedTask) -> None:
        super().__init__(task)
        self._choice = task.choice
        self._planned: LazyModel | None = None
        self._names: dict[str, frozenset[str]] = {}

    @property
    def planned(self) -> LazyModel:
        """The compressed model before this stage; factors are not rounded to the output's dtype."""
        if self._planned is None:
            self._planned = self.dense.planned(
                self.task.plan, self._before, output_dtype=torch.float32, dtype=torch.float32
            )
        return self._planned

    def indices(self, shard: Shard) -> dict[str, Tensor]:
        """Indices of the outputs of pivoted linears, by name; no training changes them."""
        inside = (each.name for each in self.task.linears if each.block in shard.blocks)
        modules = {name: shard.module(name) for name in inside}
        return {
            f"{name}.index": module.index.cpu()
            for name, module in modules.items()
            if isinstance(module, PivotedLinear)
        }

    def commit_trained(
        self, block: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> None:
        """Commits what became of a block's parameters, given by their names in the model."""
        self.commit_stored(self.task.keys[block], self.stored(tensors), facts)

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to be stored, by their names on disk."""
        disk_names = self.planned.disk_names
        # of tied tensors only one is stored; a copy each, since a file shares no memory
        return {
            disk_names[name]: tensor.clone()
            for name, tensor in tensors.items()
            if name in disk_names
        }

    def commit_stored(
        self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Commits a unit of tensors by their names on disk."""
        unit = self.run.units.begin(key)
        with unit.file(TRAINED_FILE) as path:
            save_file(dict(tensors), path)
        unit.commit(environment=self.environment(), facts=facts)

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Writes one file of the checkpoint, with trained tensors where there are some."""
        return super().write(file, choice) if choice else CompressionWorker.write(self, file)

    def _read(self, tensor: TensorSpec) -> Tensor:
        return self._latest(tensor, (*self.task.earlier, self.task.keys))

    def _before(self, tensor: TensorSpec) -> Tensor:
        return self._latest(tensor, self.task.earlier)

    def _latest(self, tensor: TensorSpec, stages: tuple[Mapping[int, str], ...]) -> Tensor:
        for keys in reversed(stages):
            for key in keys.values():
                if tensor.name in self._trained(key):
                    with safe_open(self._trained_path(key), framework="pt") as file:
                        trained: Tensor = file.get_tensor(tensor.name)
                    return trained
        if self.task.choice:
            return super()._read(tensor)
        return CompressionWorker._read(self, tensor)

    def _trained(self, key: str) -> frozenset[str]:
        """The tensors of a unit, by their names on disk; a unit that is there does not change."""
        if key not in self._names:
            with safe_open(self._trained_path(key), framework="pt") as file:
                self._names[key] = frozenset(file.keys())
        return self._names[key]

    def _trained_path(self, key: str) -> Path:
        return self.run.units.file(key, TRAINED_FILE)
