"""The worker of a compression that divides by sensitivities: models with one linear cut."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.evaluation.scoring import score
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.statistics.calibration import dense_weight
from orchestrator.runtime.worker import Emitted, Stored
from orchestrator.stages.context.compress_worker import CompressionTask, CompressionWorker
from orchestrator.stages.context.curvature_worker import CurvatureWorker
from orchestrator.stages.context.tokens import first_chunk
from orchestrator.store.chunks import Record


@dataclass(frozen=True, slots=True)
class CutTrial:
    """The model with one linear cut, or those that share a basis, whose loss is wanted."""

    block: int
    """The first block that is not the dense model's; of the dense model itself, one past all."""
    linears: tuple[str, ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class CutTrials:
    """Models that pass through the shards from where they differ from the dense one.

    The first is the dense model. Its chunks are what the others start from.
    """

    pass_key: str
    trials: tuple[CutTrial, ...]
    chunks: int
    """Calibration sequences for each, the first ones; chunk c of trial t passes as t chunks + c."""


class SensitivityWorker(CompressionWorker):
    """Calibrates and decomposes as ever; beside that it runs shards with one linear cut.

    A trial whose block is in the shard starts at the dense input of that block, which is computed
    once for each sequence, whatever the number of trials. Held for it: the shard's boundary states
    of every sequence, and the dense weight of the linear that is cut.
    """

    def __init__(self, task: CompressionTask) -> None:
        self._whole: list[tuple[Tensor, Tensor]] = []
        self._dense_states: dict[tuple[int, int], Chunk] = {}
        super().__init__(task)
        self._calibration_chunks = self.chunks
        self._trials: CutTrials | None = None
        self._number = 0

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...], *about: Any) -> None:
        """Loads a shard, for statistics or, if it is about `CutTrials`, for models with a cut."""
        self._trials, self._number = None, 0
        self.chunks = self._calibration_chunks
        match about:
            case (CutTrials() as trials,):
                super().open(blocks, todo)
                self._trials = trials
                self.chunks = self.run.chunks(trials.pass_key, self.environment())
            case _:
                super().open(blocks, todo, *about)

    def close(self) -> None:
        """Frees the shard, its statistics and its dense states."""
        self._whole, self._dense_states = [], {}
        super().close()

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one sequence through what the shard has of its trial.

        The small result: behind the last block the sequence's score.
        """
        if self._trials is None:
            return super().step(index, emit, record)
        assert self._shard is not None
        number, sequence = divmod(index, self._trials.chunks)
        trial, blocks = self._trials.trials[number], self._shard.blocks
        if number != self._number:
            self._take_up(number)
        if trial.block < blocks.start:
            start = blocks.start
            chunk = self.input_chunk(start, index, record)
        else:
            # one that comes to its block only later is dense up to the shard's end
            start = min(trial.block, blocks.stop - 1)
            chunk = self._dense_state(start, sequence, index, record)
        part = range(start, blocks.stop)
        if not self._shard.is_last:
            passed = replace(self._shard.forward(chunk, part=part), index=index)
            return None, self.emit(blocks.stop, passed) if emit else None
        logits = self._shard.logits(chunk, part=part)
        return score(chunk.tokens, chunk.mask, logits, None).to_json(), None

    def next_inputs(self, index: int) -> list[Stored]:
        # the input of a trial is kept here, or stored under another index
        return super().next_inputs(index) if self._trials is None else []

    def _dense_state(self, block: int, sequence: int, index: int, record: Emitted) -> Chunk:
        """The dense model's state at a block's input; blocks before it are dense in the shard."""
        assert self._shard is not None
        assert self._tokens is not None
        if (block, sequence) not in self._dense_states:
            if block == 0:
                chunk = first_chunk(self._tokens, sequence)
            elif block == self._shard.blocks.start:
                chunk = Chunk.unpack(self._dense_record(block, sequence, index, record))
            else:
                before = self._dense_state(block - 1, sequence, index, record)
                chunk = self._shard.forward(before, part=range(block - 1, block))
            self._dense_states[block, sequence] = chunk
        return self._dense_states[block, sequence]

    def _dense_record(self, boundary: int, sequence: int, index: int, record: Emitted) -> Record:
        """What the dense model, trial 0, has left at the shard's input.

        If that is lost, a shard before it gives it once more under the trial's own index.

        Raises:
            MissingChunk: Neither is there.
        """
        if record is None:
            record = self.chunks.read(boundary, sequence)
        return self.input_record(boundary, index, record)

    def _take_up(self, number: int) -> None:
        """Puts the last trial's dense weights back, and this one's product in their places."""
        assert self._trials is not None
        assert self._shard is not None
        for weight_OI, whole_OI in self._whole:
            weight_OI.copy_(whole_OI)
        self._whole, self._number = [], number
        trial = self._trials.trials[number]
        for linear in self.task.linears:
            if linear.name not in trial.linears or linear.block not in self._shard.blocks:
                continue
            weight_OI = dense_weight(self._shard.module(linear.name))
            self._whole.append((weight_OI, weight_OI.clone()))
            dtype = torch.promote_types(weight_OI.dtype, torch.float32)
            weight_OR, down_RI = (
                self._factor(linear, part, trial.rank).to(dtype) for part in ("weight", "down")
            )
            weight_OI.copy_(weight_OR @ down_RI)


class CurvatureSensitivityWorker(SensitivityWorker, CurvatureWorker):
    """The same where statistics come from gradients too."""
