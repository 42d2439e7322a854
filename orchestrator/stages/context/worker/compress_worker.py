"""Worker of `compress`: statistics of a shard, decompositions of its blocks, files of the result.

Shape suffixes: O outputs, I inputs.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.joint import on_top, side_by_side
from orchestrator.linalg.low_rank import InputGram, OutputGram, summed
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.statistics.routed import PoolSum
from orchestrator.plan.experts import expert_name
from orchestrator.plan.grouping import is_wide, stack
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored, Worker
from orchestrator.stages.context.expert_group import WHOLE, ExpertGroup
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.expert_units import (
    POOLS_FILE,
    EarlierGroups,
    save_sums,
    statistics_file,
)
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


@dataclass(frozen=True, slots=True)
class GatherStatistics:
    """Request for the forward pass that gathers statistics."""

    group: ExpertGroup = WHOLE
    """Experts whose statistics are gathered."""

    def start(
        self, worker: "CompressionWorker", blocks: range, todo: tuple[int, ...]
    ) -> StatisticsPass:
        task = worker.task
        linears, magnitudes = task.of_groups(todo), task.method.magnitudes
        opened = worker.dense.open(blocks, linears, group=self.group, magnitudes=magnitudes)
        return StatisticsPass(worker, opened, worker.dense_chunks)


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
        self,
        blocks: tuple[int, int],
        todo: tuple[int, ...],
        request: PassRequest = GatherStatistics(),
    ) -> None:
        """Load a shard, with empty statistics of the blocks that are not committed.

        Args:
            request: The pass.
        """
        self._slot.close()
        self._slot.put(request.start(self, range(*blocks), todo))
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

        Linears that share a basis are one joint linear; their statistics are summed. Of
        several groups of experts the last one commits the results of all; see `ExpertGroup`.

        Returns the unit's facts: for each linear those of its kind of result, cosines, and seconds.
        """
        opened, grouping, start = self.open_pass.opened, self.task.grouping, time.monotonic()
        group, key = opened.group, self.task.block_keys[block]
        blocks = range(block, block + grouping.size)
        linears = [each for each in self.task.linears if each.block in blocks]
        earlier = EarlierGroups(self, key, group, linears)
        opened.settle()
        own = group.linears(linears, grouping)
        before = earlier.pools()
        pools = {} if before is None else opened.calibration.pool(own, before)
        # every label draw repeats the rows
        draws = max(self.task.method.label_draws, 1)
        routed = opened.calibration.expert_tokens(own).items()
        tokens = earlier.expert_tokens | {name: count // draws for name, count in routed}
        unit = self.run.units.begin(group.key(key))
        facts: dict[str, Any] = {}
        if group.is_last:
            facts["linears"] = self._commit_all(grouping.groups(linears), earlier, unit)
            facts["cosines"] = {
                name: {"mean": cosine.mean, "tokens": cosine.tokens}
                for each in blocks
                for name, cosine in opened.calibration.cosines(each).items()
            }
        else:
            facts |= self._commit_part(grouping.groups(own), pools, unit)
        if tokens:
            named = dict.fromkeys(map(expert_name, linears))
            facts["expert_tokens"] = {name: tokens[name] for name in named if name in tokens}
        seconds, memory = time.monotonic() - start, self.usage().to_json()
        facts["timings"] = {"seconds": seconds, "memory": memory}
        unit.commit(environment=self.environment(), facts=facts)
        return facts

    def _commit_all(
        self, groups: Sequence[Sequence[Linear]], earlier: EarlierGroups, unit: UnitWriter
    ) -> list[dict[str, Any]]:
        """Write the results of all linears of a block; returns their facts."""
        opened, results = self.open_pass.opened, []
        with InTurn() as disk:
            for group in groups:
                name = factors_file(group[0])
                if (result := earlier.result(group[0], name)) is not None:
                    found, path = result
                    disk.submit(_copy, path, unit, name)
                else:
                    if (sums := earlier.statistics(group[0])) is not None:
                        opened.calibration.restore(group[0], sums)
                    found, stored = self._decompose(opened, group)
                    disk.submit(_save, stored, unit, name)
                    del stored
                results.append(found)
        return results

    def _commit_part(
        self, groups: Sequence[Sequence[Linear]], pools: Mapping[str, PoolSum], unit: UnitWriter
    ) -> dict[str, Any]:
        """Write the results of a group of experts that is not the last; returns their facts.

        Rare experts are left to the last group, which knows the sums over all.

        Args:
            pools: Sums over the experts of this group and those before it.
        """
        calibration = self.open_pass.opened.calibration
        results, deferred = [], []
        with InTurn() as disk:
            disk.submit(save_sums, pools, unit, POOLS_FILE)
            for group in groups:
                first = group[0]
                if calibration.is_rare(first):
                    deferred.append(first.name)
                    disk.submit(save_sums, calibration.sums(first), unit, statistics_file(first))
                    calibration.forget(group)
                    continue
                found, stored = self._decompose(self.open_pass.opened, group)
                results.append(found)
                disk.submit(_save, stored, unit, factors_file(first))
                del stored
        return {"linears": results, "deferred": deferred}

    def _decompose(
        self, opened: OpenShard, group: Sequence[Linear]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return facts and stored tensors, on the host, of linears that are decomposed as one.

        Raises:
            InputError: One in a vision tower that the model does not run.
        """
        method, linear = self.task.method, stack(group)
        weight_OI, statistic = _joined(opened, group)
        if linear.tower and not statistic.tokens:
            raise InputError(
                f"{linear.name}: the model does not run it on the images of the calibration; leave "
                "it out by --ignore"
            )
        if method.gradient != "curvature" and statistic.gradient is not None:
            statistic.gradient.check(linear.name)
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


class InTurn:
    """Thread that writes one file while the next one is computed; no more than one waits."""

    def __enter__(self) -> Self:
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None
        return self

    def submit(self, write: Callable[..., None], *given: Any) -> None:
        """Write a file once those before it are written.

        Raises:
            Exception: The file before it could not be written.
        """
        if self._last is not None:
            self._last.result()
        self._last = self._disk.submit(write, *given)

    def __exit__(self, *exception: object) -> None:
        self._disk.shutdown()
        if self._last is not None and exception[0] is None:
            self._last.result()


def _copy(path: Path, unit: UnitWriter, name: str) -> None:
    with unit.file(name) as copy:
        shutil.copyfile(path, copy)


def _save(tensors: dict[str, Tensor], unit: UnitWriter, name: str) -> None:
    with unit.file(name) as path:
        save_file(tensors, path)
