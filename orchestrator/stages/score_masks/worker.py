"""Pass of masked models through the shards, for their losses."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from orchestrator.device.malloc import return_freed_memory
from orchestrator.methods.kinds.ranked import MaskedParts
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.statistics.orientation import as_dense, dense_weight
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.masks import read_candidates
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.context.worker.open_shard import OpenShard


@dataclass(frozen=True, slots=True)
class MaskTrial:
    """A masked model whose loss is wanted; a plain value."""

    candidates_key: str
    """Key of the unit with its probabilities, or with the choice."""
    seed: tuple[int, ...] | None
    """Seed of its draws, beside the linear's name; None if it is a choice."""


@dataclass(frozen=True, slots=True)
class MaskTrials:
    """Masked models that pass through the shards one after the other, on the same sequences."""

    pass_key: str
    trials: tuple[MaskTrial, ...]
    chunks: int
    """Calibration sequences for each, the first ones; chunk c of trial t passes as t chunks + c."""

    def start(
        self, worker: CompressionWorker, blocks: range, todo: tuple[int, ...]
    ) -> "MaskedModels":
        return MaskedModels(worker, worker.dense.open(blocks), self)


class MaskedModels:
    """A shard whose cut linears are masked, for each trial anew."""

    def __init__(self, worker: CompressionWorker, opened: OpenShard, trials: MaskTrials) -> None:
        self._worker, self.opened, self._trials = worker, opened, trials
        self.chunks = worker.run.chunks(trials.pass_key, worker.environment())
        self._trial: int | None = None
        self._masked: set[str] = set()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one sequence through the shard of its masked model.

        The small result: at the first chunk of a mask, the number of kept draws of every
        candidate; after the last block the sequence's score.
        """
        worker, shard = self._worker, self.opened.shard
        number, sequence = divmod(index, self._trials.chunks)
        drawn = self._mask(number) if number != self._trial else {}
        if shard.is_first:
            chunk = replace(worker.dense.first_chunk(sequence), index=index)
        else:
            chunk = worker.input_chunk(shard.blocks.start, index, record)
        if not shard.is_last:
            passed = shard.forward(chunk)
            return {"drawn": drawn}, worker.emit(shard.blocks.stop, passed) if emit else None
        logits = shard.logits(chunk)
        found = score(chunk.tokens, chunk.mask, logits, None, predicting_BT=chunk.predicting)
        return {"drawn": drawn, "score": found.to_json()}, None

    def next_inputs(self, index: int) -> list[Stored]:
        return self.opened.stored_inputs(self.chunks, index)

    def _mask(self, number: int) -> dict[str, tuple[list[int], list[int]]]:
        """Replace the shard's weights by those of a trial."""
        trial, drawn = self._trials.trials[number], {}
        worker, shard = self._worker, self.opened.shard
        for linear in worker.task.linears:
            if linear.block not in shard.blocks:
                continue
            weight_OI = dense_weight(shard.module(linear.name))
            values = read_candidates(worker.run, trial.candidates_key, linear)
            if values is None:
                self._restore(linear, weight_OI)
                continue
            mask = values.chosen() if trial.seed is None else values.draw(*trial.seed, linear.name)
            stored = worker.decompositions.stored(linear)
            weight_OI.copy_(MaskedParts.read(stored, mask).product())
            self._masked.add(linear.name)
            drawn[linear.name] = mask.drawn(values.counts_B)
        self._trial = number
        return_freed_memory()
        return drawn

    def _restore(self, linear: Linear, weight_OI: Tensor) -> None:
        """Restore the dense weight if an earlier mask has replaced it."""
        if linear.name not in self._masked:
            return
        stored = self._worker.dense.lazy.load(f"{linear.name}.weight")
        weight_OI.copy_(as_dense(self.opened.shard.module(linear.name), stored))
        self._masked.remove(linear.name)
