"""Worker of `compress`: statistics of a shard, decompositions of its blocks, files of the result.

Shape suffixes: O outputs, I inputs.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.linalg.joint import on_top, side_by_side
from orchestrator.linalg.low_rank import InputGram, OutputGram, summed
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.statistics.calibration import dense_weight
from orchestrator.plan.grouping import is_wide, stack
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.open_shard import (
    DenseModel,
    OpenPass,
    OpenShard,
    PassSlot,
    StatisticsPass,
)
from orchestrator.stages.context.worker.pivoted import PivotedFactors, commit_pivoted
from orchestrator.stages.context.worker.stored import (
    Decompositions,
    DenseTensors,
    KeptCandidates,
    MergedWeights,
    StoredTensors,
    factors_file,
    host_tensors,
)
from orchestrator.store.units import UnitWriter


class PassRequest(Protocol):
    """Value by which a stage asks for a pass of its own through the shards that are opened."""

    def start(self, worker: "CompressionWorker", blocks: range, todo: tuple[int, ...]) -> OpenPass:
        """Open a shard for the pass."""
        ...


class CompressionWorker(Worker):
    """Holds one shard at a time: for statistics, or for the pass that a stage asks for."""

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self.dense = DenseModel(task, self.run, self.device)
        self.decompositions = Decompositions(task, self.run, self.device)
        self.dense_chunks = self.chunks
        """Chunks of the pass that gathers statistics."""
        self._slot = PassSlot()
        self._stored = cache(lambda choice: planned_tensors(self.decompositions, task, choice))

    @property
    def open_pass(self) -> OpenPass:
        """The pass through the open shard."""
        return self._slot.current

    def open(
        self, blocks: tuple[int, int], todo: tuple[int, ...], request: PassRequest | None = None
    ) -> None:
        """Load a shard, with empty statistics of the blocks that are not committed.

        Args:
            request: Another pass, in place of the one that gathers statistics.
        """
        self._slot.close()
        part = range(*blocks)
        if request is not None:
            self._slot.put(request.start(self, part, todo))
        else:
            linears, magnitudes = self.task.of_groups(todo), self.task.method.magnitudes
            opened = self.dense.open(part, linears, magnitudes=magnitudes)
            self._slot.put(StatisticsPass(self, opened, self.dense_chunks))
        self.chunks = self.open_pass.chunks

    def read_ahead(self, blocks: range) -> None:
        """Prefetch the dense weights of later blocks into the system's cache."""
        self.dense.lazy.read_ahead(blocks)

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one chunk through the shard."""
        return self.open_pass.step(index, emit, record)

    def next_inputs(self, index: int) -> list[Stored]:
        return self._slot.next_inputs(index)

    def finish(self, block: int) -> dict[str, Any]:
        """Decompose the linears of a group of blocks and commit them, one file each.

        Linears that share a basis are one tall or wide weight; their statistics are summed.

        Returns the unit's facts: for each linear those of its kind of result, cosines, and seconds.
        """
        opened = self.open_pass.opened
        start = time.monotonic()
        grouping = self.task.grouping
        blocks = range(block, block + grouping.size)
        opened.settle()
        linears = [each for each in self.task.linears if each.block in blocks]
        # every label draw repeats the rows
        draws = max(self.task.method.label_draws, 1)
        routed = opened.calibration.expert_tokens(linears).items()
        expert_tokens = {name: tokens // draws for name, tokens in routed}
        groups = grouping.groups(linears)
        unit = self.run.units.begin(self.task.block_keys[block])
        results = []
        with ThreadPoolExecutor(max_workers=1) as disk:
            saved: Future[None] | None = None
            for group in groups:
                found, stored = self._decompose(opened, group)
                results.append(found)
                if saved is not None:
                    saved.result()
                # one linear is written while the next one is decomposed
                saved = disk.submit(_save, stored, unit, factors_file(group[0]))
                del stored
            if saved is not None:
                saved.result()
        facts = {
            "linears": results,
            "cosines": {
                name: {"mean": cosine.mean, "tokens": cosine.tokens}
                for each in blocks
                for name, cosine in opened.calibration.cosines(each).items()
            },
            **({"expert_tokens": expert_tokens} if expert_tokens else {}),
            "timings": {"seconds": time.monotonic() - start, "memory": self.usage().to_json()},
        }
        unit.commit(environment=self.environment(), facts=facts)
        return facts

    def _decompose(
        self, opened: OpenShard, group: Sequence[Linear]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return facts and stored tensors, on the host, of linears that are decomposed as one."""
        method, linear = self.task.method, stack(group)
        weight_OI, statistic = _joined(opened, group)
        # a statistic is a copy: its Grams are freed before the decomposition takes memory
        opened.calibration.forget(group)
        rank = max(self.task.form.break_even(linear), 1)
        result = method.decompose(weight_OI, statistic, rank)
        stored = host_tensors(method.kind, result, self.task.output_dtype or weight_OI.dtype)
        return method.kind.facts(linear.name, weight_OI, result), stored

    def pivot(self, name: str, rank: int) -> dict[str, Any]:
        """Convert a linear's factors of a rank to pivoted storage; see `commit_pivoted`."""
        return commit_pivoted(self, self.task, self.decompositions, (name, rank))

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Write one file of the checkpoint: dense tensors copied, the others cut to their size.

        Args:
            choice: Unit of the kept candidates, if the allocation chooses one by one.
        """
        stored: StoredTensors = self._stored(choice)
        return stored.write(file, self.task.out)


def planned_tensors(
    decompositions: Decompositions, task: CompressionTask, choice: str
) -> StoredTensors:
    """Return the tensors of the compressed model before any stage has trained it.

    Args:
        choice: Unit of the kept candidates, or "".
    """
    kept = KeptCandidates(choice, decompositions, task) if choice else None
    chosen = (kept,) if kept else ()
    dense, pivoted = DenseTensors(task.model), PivotedFactors(task, decompositions.run)
    merged = MergedWeights(dense, decompositions)
    return StoredTensors((dense, pivoted, *chosen, merged, decompositions), kept)


def _joined(opened: OpenShard, group: Sequence[Linear]) -> tuple[Tensor, InputGram | OutputGram]:
    """Return weight and statistic of linears that are decomposed as one."""
    weights = [dense_weight(opened.shard.module(each.name)) for each in group]
    statistics = (opened.calibration.statistic(each) for each in group)
    if len(group) == 1:
        return weights[0], next(statistics)
    if is_wide(group):
        return side_by_side(weights, statistics)
    if group[0].experts:
        return on_top(weights, statistics, [each.site for each in group])
    return torch.cat(weights), summed(list(statistics))


def _save(tensors: dict[str, Tensor], unit: UnitWriter, name: str) -> None:
    with unit.file(name) as path:
        save_file(tensors, path)
