"""Passes of models with one linear truncated through the shards, for their losses."""

from dataclasses import dataclass, replace
from typing import Any

from orchestrator.models.evaluation.scoring import score
from orchestrator.models.shards.chunk import Chunk
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.context.worker.cut_linears import CutLinear
from orchestrator.stages.context.worker.open_shard import OpenShard
from orchestrator.store.chunks import Record


@dataclass(frozen=True, slots=True)
class CutTrial:
    """Model with one linear truncated, or with all linears that share its basis."""

    block: int
    """First block that differs from the dense model; number of blocks for the dense model."""
    linears: tuple[str, ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class CutTrials:
    """Request for a pass of trials, each from its first block that is not dense.

    The first trial is the dense model; the others start from its chunks.
    """

    pass_key: str
    trials: tuple[CutTrial, ...]
    chunks: int
    """Number of calibration sequences of a trial, the first ones; sequence s of trial t is chunk
    t · chunks + s of the pass."""

    def start(self, worker: CompressionWorker, blocks: range, todo: tuple[int, ...]) -> "CutModels":
        return CutModels(worker, worker.dense.open(blocks), self)


class CutModels:
    """Shard of the trials, of which one linear at a time is truncated.

    A trial of a linear in the shard starts at the dense input of its block, which is computed once
    per sequence for all trials. Memory beside the shard: the dense block inputs of every sequence,
    and the dense weight of the truncated linear.
    """

    def __init__(self, worker: CompressionWorker, opened: OpenShard, trials: CutTrials) -> None:
        self._worker, self.opened, self._trials = worker, opened, trials
        self.chunks = worker.run.chunks(trials.pass_key, worker.environment())
        self._number = 0
        self._cuts: list[CutLinear] = []
        self._dense_states: dict[tuple[int, int], Chunk] = {}

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Pass one sequence through the blocks of the shard from the first one of its trial.

        Returns:
            The score of the sequence after the last block, else None; and the chunk to emit.
        """
        worker, shard = self._worker, self.opened.shard
        number, sequence = divmod(index, self._trials.chunks)
        trial, blocks = self._trials.trials[number], shard.blocks
        if number != self._number:
            self._cut(number)
        if trial.block < blocks.start:
            start = blocks.start
            chunk = worker.input_chunk(start, index, record)
        else:
            # a trial of a later block passes the last block as the dense model
            start = min(trial.block, blocks.stop - 1)
            chunk = self._dense_state(start, sequence, index, record)
        part = range(start, blocks.stop)
        if not shard.is_last:
            passed = replace(shard.forward(chunk, part=part), index=index)
            return None, worker.emit(blocks.stop, passed) if emit else None
        logits = shard.logits(chunk, part=part)
        found = score(chunk.tokens, chunk.mask, logits, None, predicting_BT=chunk.predicting)
        return found.to_json(), None

    def next_inputs(self, index: int) -> list[Stored]:
        # inputs of trials are in memory, or stored under the index of the dense model
        return []

    def _dense_state(self, block: int, sequence: int, index: int, record: Emitted) -> Chunk:
        """Return the dense input of a block of the shard, computed from that of the first block."""
        shard = self.opened.shard
        if (block, sequence) not in self._dense_states:
            if block == 0:
                chunk = self._worker.dense.first_chunk(sequence)
            elif block == shard.blocks.start:
                chunk = Chunk.unpack(self._dense_record(block, sequence, index, record))
            else:
                before = self._dense_state(block - 1, sequence, index, record)
                chunk = shard.forward(before, part=range(block - 1, block))
            self._dense_states[block, sequence] = chunk
        return self._dense_states[block, sequence]

    def _dense_record(self, boundary: int, sequence: int, index: int, record: Emitted) -> Record:
        """Return the chunk of the dense model, trial 0, at the shard's input.

        If it is lost, the preceding shard computes it again, under the index of the trial.

        Raises:
            MissingChunk: Both are missing.
        """
        if record is None:
            record = self.chunks.read(boundary, sequence)
        return self._worker.input_record(boundary, index, record)

    def _cut(self, number: int) -> None:
        """Restore the dense weights of the previous trial and truncate those of this one."""
        worker, shard = self._worker, self.opened.shard
        for cut in self._cuts:
            cut.restore()
        self._cuts, self._number = [], number
        trial = self._trials.trials[number]
        for linear in worker.task.linears:
            if linear.name not in trial.linears or linear.block not in shard.blocks:
                continue
            module = shard.module(linear.name)
            self._cuts.append(CutLinear.put(module, linear, trial.rank, worker.decompositions))
