"""Passes of models that are cut by whole plans through the shards, for their losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.statistics.orientation import as_dense, dense_weight
from orchestrator.models.training.distill import TopK, distill
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.tokens import TokenArrays, first_chunk, read_tokens
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.context.worker.cut_linears import bias_of, put_cut
from orchestrator.stages.context.worker.open_shard import OpenShard

TARGETS_FILE = "targets.safetensors"
TOP_K = 256
"""Most probable outcomes of a token that are stored of the dense model, 2 kB a token. The
divergence over these, with the rest as one, is a lower bound of that over the vocabulary."""


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
    targets: tuple[str, ...] = ()
    """Keys of the units with the dense model's distributions, by sequence; empty if losses are
    those of the text alone."""
    makes_targets: bool = False
    """True for the pass of the dense model that leaves these units, in the place of scores."""

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
        self._biases: dict[str, nn.Parameter | None] = {}

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
        logits_BTV = shard.logits(chunk)
        if self._trials.makes_targets:
            return self._commit_targets(sequence, logits_BTV), None
        found = score(chunk.tokens, chunk.mask, logits_BTV, None, predicting_BT=chunk.predicting)
        if self._trials.targets:
            found = replace(found, divergence=self._divergence(sequence, chunk, logits_BTV))
        return found.to_json(), None

    def _commit_targets(self, sequence: int, logits_BTV: Tensor) -> dict[str, Any]:
        """Commit the distributions of the dense model at the tokens of a sequence."""
        unit = self._worker.run.units.begin(self._trials.targets[sequence])
        with unit.file(TARGETS_FILE) as path:
            save_file(TopK.of(logits_BTV, TOP_K, 1.0).tensors(), path)
        unit.commit(environment=self._worker.environment(), facts={})
        return {}

    def _divergence(self, sequence: int, chunk: Chunk, logits_BTV: Tensor) -> float:
        """Sum the divergence from the dense model over the tokens whose next one counts."""
        path = self._worker.run.units.file(self._trials.targets[sequence], TARGETS_FILE)
        targets, mask_BT = TopK.from_tensors(load_file(path)), chunk.mask.cpu()
        counted_BT = mask_BT if chunk.predicting is None else chunk.predicting.cpu() & mask_BT
        is_followed_BT = pad(mask_BT[:, 1:], (0, 1), value=False)
        where_BT = counted_BT & is_followed_BT
        found, _ = distill(logits_BTV, chunk.tokens, where_BT, targets, temperature=1.0)
        return found.divergence

    def next_inputs(self, index: int) -> list[Stored]:
        return self.opened.stored_inputs(self.chunks, index)

    def _cut(self, number: int) -> None:
        """Put the products of a trial's factors and their biases in place, where its ranks are
        others."""
        shard, ranks = self.opened.shard, self._trials.trials[number].ranks
        for linear in self._worker.task.linears:
            before, rank = self._ranks.get(linear.name, 0), ranks.get(linear.name, 0)
            if linear.block not in shard.blocks or rank == before:
                continue
            module = shard.module(linear.name)
            self._biases.setdefault(linear.name, bias_of(module))
            if rank:
                put_cut(module, linear, rank, self._worker.decompositions)
            else:
                dense_weight(module).copy_(self._dense(linear))
                module.register_parameter("bias", self._biases[linear.name])
            self._ranks[linear.name] = rank
        self._number = number
        return_freed_memory()

    def _dense(self, linear: Linear) -> Tensor:
        """Read the dense weight again."""
        stored = self._worker.dense.lazy.load(f"{linear.name}.weight")
        return as_dense(self.opened.shard.module(linear.name), stored)
