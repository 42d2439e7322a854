"""Passes of models that are cut by whole plans through the shards, for their losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.statistics.orientation import as_dense, dense_weight
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.tokens import TokenArrays, first_chunk, read_tokens
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.context.worker.open_shard import OpenShard


@dataclass(frozen=True, slots=True)
class PlanTrial:
    """A model whose loss is wanted; a plain value."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank of every linear that is cut; the others are dense."""


@dataclass(frozen=True, slots=True)
class PlanTrials:
    """Models that pass through the shards one after the other, on the same held-out sequences."""

    pass_key: str
    tokens_key: str
    """Key of the unit of the held-out tokens."""
    trials: tuple[PlanTrial, ...]
    chunks: int
    """Sequences of the text; sequence s of trial t is chunk t · chunks + s of the pass."""

    def start(self, worker: CompressionWorker, blocks: range, todo: tuple[int, ...]) -> "CutByPlan":
        return CutByPlan(worker, worker.dense.open(blocks), self)


class CutByPlan:
    """A shard whose linears are cut by the plan of each trial in turn.

    Memory beside the shard: the factors and the product of one linear.
    """

    def __init__(self, worker: CompressionWorker, opened: OpenShard, trials: PlanTrials) -> None:
        self._worker, self.opened, self._trials = worker, opened, trials
        self.chunks = worker.run.chunks(trials.pass_key, worker.environment())
        self._number: int | None = None
        self._ranks: dict[str, int] = {}

    @cached_property
    def _tokens(self) -> TokenArrays:
        return read_tokens(self._worker.run, self._trials.tokens_key)

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one sequence through the shard; the small result is its score after the last
        block, else None."""
        worker, shard = self._worker, self.opened.shard
        number, sequence = divmod(index, self._trials.chunks)
        if number != self._number:
            self._cut(number)
        if shard.is_first:
            chunk = replace(first_chunk(self._tokens, sequence), index=index)
        else:
            chunk = worker.input_chunk(shard.blocks.start, index, record)
        if not shard.is_last:
            passed = shard.forward(chunk)
            return None, worker.emit(shard.blocks.stop, passed) if emit else None
        logits = shard.logits(chunk)
        found = score(chunk.tokens, chunk.mask, logits, None, predicting_BT=chunk.predicting)
        return found.to_json(), None

    def next_inputs(self, index: int) -> list[Stored]:
        return self.opened.stored_inputs(self.chunks, index)

    def _cut(self, number: int) -> None:
        """Put the products of a trial's factors in place, where its ranks are others."""
        shard, ranks = self.opened.shard, self._trials.trials[number].ranks
        for linear in self._worker.task.linears:
            before, rank = self._ranks.get(linear.name, 0), ranks.get(linear.name, 0)
            if linear.block not in shard.blocks or rank == before:
                continue
            weight_OI = dense_weight(shard.module(linear.name))
            weight_OI.copy_(self._product(linear, rank) if rank else self._dense(linear))
            self._ranks[linear.name] = rank
        self._number = number
        return_freed_memory()

    def _product(self, linear: Linear, rank: int) -> Tensor:
        """Compute the product of the stored factors, cut to a rank, at least in float32."""
        factors = self._worker.decompositions
        weight_OR = factors.factor(linear, "weight", rank)
        dtype = torch.promote_types(weight_OR.dtype, torch.float32)
        return weight_OR.to(dtype) @ factors.factor(linear, "down", rank).to(dtype)

    def _dense(self, linear: Linear) -> Tensor:
        """Read the dense weight again."""
        stored = self._worker.dense.lazy.load(f"{linear.name}.weight")
        return as_dense(self.opened.shard.module(linear.name), stored)
