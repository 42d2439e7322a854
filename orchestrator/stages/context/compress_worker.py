"""The worker of `compress`: calibrate a shard, decompose its blocks, write files of the result.

Shape suffixes: O outputs, I inputs, R rank.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.linalg import vector_norm as norm

from orchestrator.allocate.bernoulli import Candidates
from orchestrator.device.malloc import return_freed_memory
from orchestrator.device.transport import download, upload
from orchestrator.linalg.low_rank import LowRank, summed
from orchestrator.linalg.pivot import pivot
from orchestrator.linalg.ranked import RankedParts
from orchestrator.linalg.scaled import ScaledLowRank
from orchestrator.linalg.sparse import Sparse
from orchestrator.linalg.two_sided import TwoSidedLowRank
from orchestrator.linalg.two_sided_sparse import SparseLowRank
from orchestrator.methods.base import Method
from orchestrator.methods.two_sided_sparse import TwoSidedSparse
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec
from orchestrator.models.checkpoint.weights import Weights, fingerprint_of
from orchestrator.models.checkpoint.write import write_file
from orchestrator.models.forms.index_codes import encode
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration, dense_weight
from orchestrator.plan.curve import Curve
from orchestrator.plan.grouping import Grouping, stack
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored, Task, Worker
from orchestrator.stages.context.pruned import read_entries, stored_pruned, surface_of
from orchestrator.stages.context.stored_factors import read_factor, read_sparse
from orchestrator.stages.context.tokens import TokenArrays, first_chunk, read_tokens
from orchestrator.store.places import Place
from orchestrator.store.units import UnitWriter, unit_key

PIVOT_VERSION = 1
"""Raised when pivoted factors change."""
PIVOTED_FILE = "pivoted.safetensors"
PIVOTED_PARTS = ("others", "pivots", "order")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionTask(Task):
    """What the workers of one compression share; a plain value."""

    model: Place
    out: Place
    method: Method
    dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    linears: tuple[Linear, ...]
    """The targeted linears."""
    grouping: Grouping
    tokens_key: str
    block_keys: Mapping[int, str]
    """The key of the unit of decompositions, by the first block of each group of blocks."""

    def made_by(self, linear: Linear) -> list[str]:
        """The keys of the units that a linear's factors are cut from."""
        return [self.block_keys[self.grouping.first(linear.block)]]

    def pivoted_key(self, linear: Linear, rank: int) -> str:
        """The key of the unit of a linear's pivoted factors."""
        return unit_key("pivot", PIVOT_VERSION, self.made_by(linear), linear=linear.name, rank=rank)


class CompressionWorker(Worker):
    """Holds one shard at a time, with its statistics."""

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.method = task.method
        self._weights: Weights | None = None
        self._lazy_model: LazyModel | None = None
        self._tokens: TokenArrays | None = None
        self._shard: Shard | None = None
        self._calibration: Calibration | None = None
        self._entries: tuple[tuple[str, int], tuple[Tensor, Tensor]] | None = None

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...]) -> None:
        """Loads a shard, and starts the statistics of the blocks that are not committed."""
        self.close()
        self._shard = self.dense.shard(range(*blocks))
        self._calibration = self._gather(self._shard, todo)

    def read_ahead(self, blocks: range) -> None:
        """Has the dense weights of blocks read into the system's cache."""
        self.dense.read_ahead(blocks)

    @property
    def dense(self) -> LazyModel:
        """The dense model; the tokens are read with it."""
        task = self.task
        if self._lazy_model is None:
            self._lazy_model = LazyModel.open(task.model, dtype=task.dtype, device=self.device)
            self._tokens = read_tokens(self.run, task.tokens_key)
        return self._lazy_model

    def _gather(self, shard: Shard, todo: tuple[int, ...]) -> Calibration:
        """The statistics of the groups of blocks that are still to do, none gathered yet."""
        wanted = self._wanted(todo)
        return Calibration(shard, wanted, self._side, magnitudes=self.method.magnitudes)

    def _wanted(self, todo: tuple[int, ...]) -> list[Linear]:
        first = self.task.grouping.first
        return [each for each in self.task.linears if first(each.block) in todo]

    def _side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """Which Gram a linear needs; those of a group are summed, which only inputs can be."""
        if self.task.grouping.joins(linear):
            return "input"
        return self.method.side(linear, site)

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
        passed = self._calibration.forward(self.entering(index, record))
        return None, self.emit(self._shard.blocks.stop, passed) if emit else None

    def entering(self, index: int, record: Emitted) -> Chunk:
        """A chunk at the shard's input: tokens at the model's, else what a shard before has left.

        Raises:
            MissingChunk: That is not there.
        """
        assert self._shard is not None
        assert self._tokens is not None
        start = self._shard.blocks.start
        if start == 0:
            return first_chunk(self._tokens, index)
        chunk: Chunk = self.input_chunk(start, index, record)
        return chunk

    def next_inputs(self, index: int) -> list[Stored]:
        if self._shard is None or self._shard.is_first:
            return []
        return [(self.chunks, self._shard.blocks.start, index)]

    def finish(self, block: int) -> dict[str, Any]:
        """Decomposes the linears of a group of blocks and commits them, one file each.

        Linears that share a basis are one tall weight; their inputs' Grams are summed.

        Returns the unit's facts: curves and, for each linear, what the numerics reported.
        """
        assert self._shard is not None
        assert self._calibration is not None
        start = time.monotonic()
        grouping = self.task.grouping
        blocks = range(block, block + grouping.size)
        self._free_for_finishing()
        groups = grouping.groups([each for each in self.task.linears if each.block in blocks])
        unit = self.run.units.begin(self.task.block_keys[block])
        results = []
        with ThreadPoolExecutor(max_workers=1) as disk:
            saved: Future[None] | None = None
            for group in groups:
                found, stored = self._decompose(group)
                results.append(found)
                if saved is not None:
                    saved.result()
                # while the disk is at work on one linear, the next is decomposed
                saved = disk.submit(_save, stored, unit, factors_file(group[0]))
                del stored
            if saved is not None:
                saved.result()
        facts = {
            "linears": results,
            "cosines": {
                name: {"mean": cosine.mean, "tokens": cosine.tokens}
                for each in blocks
                for name, cosine in self._calibration.cosines(each).items()
            },
            "timings": {"seconds": time.monotonic() - start, "memory": self.usage().to_json()},
        }
        unit.commit(environment=self.environment(), facts=facts)
        return facts

    def _free_for_finishing(self) -> None:
        """Frees memory that decompositions do not need, once all chunks have passed.

        For a 70B model: 2.1 GB of embeddings or head, and a third of the Grams.
        """
        assert self._shard is not None
        assert self._calibration is not None
        self._calibration.flush_writes()
        self._shard.free_ends()

    def _decompose(self, group: Sequence[Linear]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Facts and what is stored of linears that are decomposed as one; nothing else stays."""
        assert self._shard is not None
        assert self._calibration is not None
        linear = stack(group)
        weights = [dense_weight(self._shard.module(each.name)) for each in group]
        weight_OI = torch.cat(weights) if len(weights) > 1 else weights[0]
        statistic = summed([self._calibration.statistic(each) for each in group])
        # a statistic is a copy: its Grams are freed before the decomposition takes memory
        self._calibration.forget(group)
        result = self.method.decompose(weight_OI, statistic, max(linear.break_even, 1))
        stored = _stored(result, self.task.output_dtype or weight_OI.dtype)
        return _facts(linear, weight_OI, result), stored

    def pivot(self, name: str, rank: int) -> dict[str, Any]:
        """Brings a linear's factors of a rank to pivoted storage and commits them.

        Returns the unit's facts: what was measured, see `Pivoted`.
        """
        start = time.monotonic()
        linear = self._linear(name)
        weight_OR, down_RI = (self._written(linear, part, rank) for part in ("weight", "down"))
        result = pivot(weight_OR, down_RI)
        parts = result.weight_SR, result.down_RI, result.order_O
        unit = self.run.units.begin(self.task.pivoted_key(linear, rank))
        with unit.file(PIVOTED_FILE) as path:
            stored = (download(each.contiguous()) for each in parts)
            save_file(dict(zip(PIVOTED_PARTS, stored, strict=True)), path)
        facts = {"numerics": result.report, "timings": {"seconds": time.monotonic() - start}}
        unit.commit(environment=self.environment(), facts=facts)
        return facts

    def _linear(self, name: str) -> Linear:
        return next(each for each in self.task.linears if each.name == name)

    def write(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one file of the checkpoint: dense tensors copied, the others cut to their size."""
        spec = FileSpec.from_json(file)
        return write_file(spec, self.task.out / spec.name, self._read)

    def _read(self, tensor: TensorSpec) -> Tensor:
        if tensor.part == "copy":
            self._weights = self._weights or Weights.open(self.task.model)
            return self._weights.read(tensor.source)
        linear = self._linear(tensor.source)
        if isinstance(self.method, TwoSidedSparse):
            return self._pruned(linear, tensor, self.method.steps)
        if tensor.part in ("weight", "down"):
            return self._written(linear, tensor.part, tensor.rank)
        if tensor.part in PIVOTED_PARTS:
            return self._pivoted(linear, tensor)
        return read_sparse(self._stored_file([linear]), tensor, linear, self.device)

    def _pivoted(self, linear: Linear, tensor: TensorSpec) -> Tensor:
        """A part of a linear's pivoted factors, as `pivot` has left it."""
        path = self.run.units.file(self.task.pivoted_key(linear, tensor.rank), PIVOTED_FILE)
        with safe_open(path, framework="pt") as file:
            part: Tensor = file.get_tensor(tensor.part)
        return part

    def _pruned(self, linear: Linear, tensor: TensorSpec, steps: int) -> Tensor:
        """A part of a pruned weight or of the factors beside it; entries are kept, as above."""
        path = self._stored_file([linear])
        if tensor.part in ("weight", "down"):
            outputs = range(linear.out_features)
            suffix = f".{tensor.nonzeros}"
            found = read_factor(path, tensor.part, tensor.rank, outputs, suffix)
            return upload(found, self.device)
        wanted = (linear.name, tensor.nonzeros)
        if self._entries is None or self._entries[0] != wanted:
            sizes = tensor.nonzeros, tensor.rank
            self._entries = (wanted, read_entries(path, *sizes, self.device, steps=steps))
        values_N, positions_N = self._entries[1]
        if tensor.part == "values":
            return values_N
        sizes = linear.out_features, linear.in_features
        return encode(tensor.code, positions_N, *sizes)[tensor.part]

    def _written(self, linear: Linear, part: str, rank: int) -> Tensor:
        """`weight` or `down` of a linear as it is written to the checkpoint, on the device."""
        return self._factor(linear, part, rank)

    def _factor(self, linear: Linear, part: str, rank: int) -> Tensor:
        """`weight` or `down` of a linear, cut to a rank, on the device."""
        groups = self.task.grouping.groups(self.task.linears)
        group = next(each for each in groups if linear in each)
        start = group.index(linear) * linear.out_features
        outputs = range(start, start + linear.out_features)
        found = read_factor(self._stored_file(group), part, rank, outputs)
        return upload(found, self.device)

    def _stored_file(self, group: Sequence[Linear]) -> Path:
        """What is stored of linears that share a basis, or of one that shares none."""
        key = self.task.block_keys[self.task.grouping.first(group[0].block)]
        return self.run.units.file(key, factors_file(group[0]))


def _facts(
    linear: Linear, weight_OI: Tensor, result: LowRank | Sparse | RankedParts | SparseLowRank
) -> dict[str, Any]:
    """What the driver learns of one decomposition; see `report` for what becomes of it."""
    if isinstance(result, SparseLowRank):
        return {"curve": surface_of(linear.name, result).to_json(), "numerics": result.report}
    if isinstance(result, RankedParts):
        curve = _candidates(result).to_json() | {"name": linear.name}
        return {"curve": curve, "numerics": result.report}
    if isinstance(result, Sparse):
        energies_P = result.energies_P.cpu().numpy()
        return {
            "curve": Curve(name=linear.name, energies=energies_P, total=result.total).to_json(),
            "activation_losses": result.activation_losses,
            "weight_losses": result.weight_losses,
            "numerics": result.report,
        }
    energies_K = result.energies_K.cpu().numpy()
    weight_R = (
        result.weight_R
        if isinstance(result, TwoSidedLowRank)
        else norm(result.down_RI, dim=1, dtype=torch.float64).square()
    )
    facts = {
        "curve": Curve(name=linear.name, energies=energies_K, total=result.total).to_json(),
        "weight_energies": weight_R.tolist(),
        "weight_total": float(norm(weight_OI, dtype=torch.float64).square()),
        "numerics": result.report,
    }
    if isinstance(result, ScaledLowRank):
        facts["activation_energies"] = result.activation_R.tolist()
        facts["activation_total"] = result.activation_total
    return facts


def _candidates(result: RankedParts) -> Candidates:
    return Candidates(
        direction_utilities=result.direction_utilities_R.cpu().numpy(),
        direction_magnitudes=result.direction_magnitudes_R.cpu().numpy(),
        bucket_counts=result.bucket_counts_B.cpu().numpy(),
        bucket_utilities=result.bucket_utilities_B.cpu().numpy(),
        bucket_magnitudes=result.bucket_magnitudes_B.cpu().numpy(),
        energy=result.energy,
    )


def _stored(
    result: LowRank | Sparse | RankedParts | SparseLowRank, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a unit holds, in the host's memory, to be cut by a prefix.

    Both factors in `dtype` with ranks as rows; values in float32 and positions; or all of them.
    """
    stored = {}
    if isinstance(result, SparseLowRank):
        stored = stored_pruned(result, dtype)
    elif isinstance(result, Sparse | RankedParts):
        stored = {"values": result.values_N, "positions": result.positions_N}
    if isinstance(result, LowRank | RankedParts):
        stored |= {"weight": result.weight_OR.T.to(dtype), "down": result.down_RI.to(dtype)}
    if isinstance(result, RankedParts):
        stored |= {"sketch": result.sketch_IS, "ridge": result.ridge_I}
    # transposed on the device of the result: milliseconds on a GPU
    return {name: download(rows.contiguous()) for name, rows in stored.items()}


def _save(tensors: dict[str, Tensor], unit: UnitWriter, name: str) -> None:
    with unit.file(name) as path:
        save_file(tensors, path)


def factors_file(linear: Linear) -> str:
    """Name of the file in a unit that holds a linear's factors to break-even rank."""
    return f"{linear.name}.safetensors"
