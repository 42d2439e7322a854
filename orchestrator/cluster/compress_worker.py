"""The worker of `compress`: calibrate a shard, decompose its blocks, write files of the result.

Shape suffixes: O outputs, I inputs, R rank.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.linalg import vector_norm as norm

from orchestrator.cluster.heap import return_freed_memory
from orchestrator.cluster.tokens import TokenArrays, first_chunk, read_tokens
from orchestrator.cluster.worker import Emitted, Task, Worker
from orchestrator.linalg.low_rank import LowRank
from orchestrator.methods import METHODS
from orchestrator.models.calibration import Calibration, dense_weight
from orchestrator.models.checkpoint import FileSpec, TensorSpec, write_file
from orchestrator.models.chunk import Chunk
from orchestrator.models.shard import Shard
from orchestrator.models.skeleton import Skeleton
from orchestrator.models.weights import Weights
from orchestrator.plan import Curve, Linear
from orchestrator.store.units import UnitWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionTask(Task):
    """What the workers of one compression share; a plain value."""

    model: Path
    out: Path
    method: str
    dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    linears: tuple[Linear, ...]
    """The targeted linears."""
    tokens_key: str
    block_keys: Mapping[int, str]
    """For each block the key of the unit that holds its decompositions."""


class CompressionWorker(Worker):
    """Holds one shard at a time, with its statistics."""

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task)
        self.task = task
        self.method = METHODS[task.method]
        self._weights: Weights | None = None
        self._skeleton: Skeleton | None = None
        self._tokens: TokenArrays | None = None
        self._shard: Shard | None = None
        self._calibration: Calibration | None = None

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...]) -> None:
        """Loads a shard, and starts the statistics of the blocks that are not committed."""
        self.close()
        task = self.task
        if self._skeleton is None:
            self._skeleton = Skeleton.open(task.model, dtype=task.dtype, device=self.device)
            self._tokens = read_tokens(self.run, task.tokens_key)
        self._shard = self._skeleton.shard(range(*blocks))
        wanted = [linear for linear in task.linears if linear.block in todo]
        self._calibration = Calibration(self._shard, wanted, self.method.side)

    def close(self) -> None:
        """Frees the shard and its statistics."""
        if self._calibration is not None:
            self._calibration.close()
        if self._shard is not None:
            self._shard.close()
        self._calibration = self._shard = None
        return_freed_memory()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one chunk through the shard, and into the statistics."""
        assert self._shard is not None
        assert self._calibration is not None
        assert self._tokens is not None
        blocks = self._shard.blocks
        if blocks.start == 0:
            chunk = first_chunk(self._tokens, index)
        else:
            chunk = Chunk.unpack(self.input_record(blocks.start, index, record))
        passed = self._calibration.forward(chunk)
        return None, self.emit(blocks.stop, passed) if emit else None

    def finish(self, block: int) -> dict[str, Any]:
        """Decomposes the linears of one block and commits them, one file each.

        Returns the unit's facts: curves and, for each linear, what the numerics reported.
        """
        assert self._shard is not None
        assert self._calibration is not None
        start = time.monotonic()
        linears = [linear for linear in self.task.linears if linear.block == block]
        unit = self.run.units.begin(self.task.block_keys[block])
        results = []
        with ThreadPoolExecutor(max_workers=1) as disk:
            saved: Future[None] | None = None
            for linear in linears:
                weight_OI = dense_weight(self._shard.module(linear.name))
                result = self.method.decompose(
                    weight_OI, self._calibration.statistic(linear), max(linear.break_even, 1)
                )
                self._calibration.forget([linear])
                results.append(_facts(linear, weight_OI, result))
                factors = _stored_factors(result, self.task.output_dtype or weight_OI.dtype)
                if saved is not None:
                    saved.result()
                # while the disk is at work on one linear, the next is decomposed
                saved = disk.submit(_save, factors, unit, factors_file(linear))
            if saved is not None:
                saved.result()
        facts = {
            "linears": results,
            "cosines": {
                name: {"mean": cosine.mean, "tokens": cosine.tokens}
                for name, cosine in self._calibration.cosines(block).items()
            },
            "timings": {"seconds": time.monotonic() - start, "peak_bytes": self.peak_bytes()},
        }
        unit.commit(environment=self.environment(), facts=facts)
        return facts

    def write(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one file of the checkpoint: dense tensors copied, factors cut to their rank."""
        spec = FileSpec.from_json(file)
        return write_file(spec, self.task.out / spec.name, self._read)

    def _read(self, tensor: TensorSpec) -> Tensor:
        if tensor.part == "copy":
            self._weights = self._weights or Weights.open(self.task.model)
            return self._weights.read(tensor.source)
        linear = next(each for each in self.task.linears if each.name == tensor.source)
        directory = self.run.units.directory(self.task.block_keys[linear.block])
        return read_factor(directory / factors_file(linear), tensor.part, tensor.rank)


def _facts(linear: Linear, weight_OI: Tensor, result: LowRank) -> dict[str, Any]:
    """What the driver learns of one decomposition."""
    energies_K = result.energies_K.cpu().numpy()
    curve = Curve(name=linear.name, energies=energies_K, total=result.total)
    return {
        "curve": curve.to_json(),
        "weight_energies": norm(result.down_RI, dim=1, dtype=torch.float64).square().tolist(),
        "weight_total": float(norm(weight_OI, dtype=torch.float64).square()),
        "numerics": result.report,
    }


def _stored_factors(result: LowRank, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both factors with ranks as rows, in the host's memory."""
    factors = {"weight": result.weight_OR.T, "down": result.down_RI}
    return {name: rows.to("cpu", dtype).contiguous() for name, rows in factors.items()}


def _save(tensors: dict[str, Tensor], unit: UnitWriter, name: str) -> None:
    with unit.file(name) as path:
        save_file(tensors, path)


def factors_file(linear: Linear) -> str:
    """Name of the file in a block's unit that holds a linear's factors to break-even rank."""
    return f"{linear.role}.safetensors"


def read_factor(path: Path, part: str, rank: int) -> Tensor:
    """One factor at a rank: one contiguous range of what is stored, rows being ranks in both."""
    with safe_open(path, framework="pt") as file:
        rows: Tensor = file.get_slice(part)[:rank]
        return rows.T.contiguous() if part == "weight" else rows
