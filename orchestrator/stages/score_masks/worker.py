"""The worker of a compression that chooses by losses: masked models, and files by the choice."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from orchestrator.device.malloc import return_freed_memory
from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.forms.index_codes import encode
from orchestrator.models.statistics.calibration import as_dense, dense_weight
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Emitted
from orchestrator.stages.context.compress_worker import CompressionTask, CompressionWorker
from orchestrator.stages.context.masks import (
    masked_errors,
    masked_weight,
    read_candidates,
    read_masked,
)
from orchestrator.stages.context.tokens import first_chunk


@dataclass(frozen=True, slots=True)
class MaskTrial:
    """A masked model whose loss is wanted; a plain value."""

    candidates_key: str
    """Of the unit with its probabilities, or with what was chosen."""
    seed: tuple[int, ...] | None
    """What its draws come from, beside the linear's name; nothing: it was chosen."""


@dataclass(frozen=True, slots=True)
class MaskTrials:
    """Masked models that pass through the shards one after the other, on the same sequences."""

    pass_key: str
    trials: tuple[MaskTrial, ...]
    chunks: int
    """Calibration sequences for each, the first ones; chunk c of trial t passes as t chunks + c."""


class ScoreWorker(CompressionWorker):
    """Calibrates and decomposes as ever; beside that it runs masked shards, and reads by masks."""

    def __init__(self, task: CompressionTask) -> None:
        super().__init__(task)
        self._calibration_chunks = self.chunks
        self._trials: MaskTrials | None = None
        self._trial: int | None = None
        self._masked: set[str] = set()
        self._choice = ""
        self._read_last: tuple[tuple[str, str], Mapping[str, Tensor]] | None = None

    def open(
        self, blocks: tuple[int, int], todo: tuple[int, ...], trials: MaskTrials | None = None
    ) -> None:
        """Loads a shard, for statistics or for masked models."""
        super().open(blocks, todo)
        self._trials, self._trial, self._masked = trials, None, set()
        self.chunks = self._calibration_chunks
        if trials is not None:
            self.chunks = self.run.chunks(trials.pass_key, self.environment())

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one sequence through the shard of its masked model.

        The small result: where the shard has taken up a new mask, how many draws of every
        candidate it keeps; behind the last block the sequence's score.
        """
        if self._trials is None:
            return super().step(index, emit, record)
        assert self._shard is not None
        assert self._tokens is not None
        number, sequence = divmod(index, self._trials.chunks)
        drawn = self._mask(number) if number != self._trial else {}
        blocks = self._shard.blocks
        if blocks.start == 0:
            chunk = replace(first_chunk(self._tokens, sequence), index=index)
        else:
            chunk = self.input_chunk(blocks.start, index, record)
        if not self._shard.is_last:
            passed = self._shard.forward(chunk)
            return {"drawn": drawn}, self.emit(blocks.stop, passed) if emit else None
        logits = self._shard.logits(chunk)
        found = score(chunk.tokens, chunk.mask, logits, None)
        return {"drawn": drawn, "score": found.to_json()}, None

    def _mask(self, number: int) -> dict[str, tuple[list[int], list[int]]]:
        """Puts a trial's weights in the places of the shard's."""
        assert self._trials is not None
        assert self._shard is not None
        trial, drawn = self._trials.trials[number], {}
        for linear in self.task.linears:
            if linear.block not in self._shard.blocks:
                continue
            weight_OI = dense_weight(self._shard.module(linear.name))
            values = read_candidates(self.run, trial.candidates_key, linear)
            if values is None:
                self._restore(linear, weight_OI)
                continue
            mask = values.chosen() if trial.seed is None else values.draw(*trial.seed, linear.name)
            parts = read_masked(self._stored_file([linear]), mask, self.device)
            weight_OI.copy_(masked_weight(parts))
            self._masked.add(linear.name)
            drawn[linear.name] = mask.drawn(values.counts_B)
        self._trial = number
        return_freed_memory()
        return drawn

    def _restore(self, linear: Linear, weight_OI: Tensor) -> None:
        """The dense weight again, if an earlier mask took its place."""
        if linear.name not in self._masked:
            return
        assert self._lazy_model is not None
        assert self._shard is not None
        stored = self._lazy_model.load(f"{linear.name}.weight")
        weight_OI.copy_(as_dense(self._shard.module(linear.name), stored))
        self._masked.remove(linear.name)

    def write(self, file: Mapping[str, Any], choice: str = "") -> dict[str, Any]:
        """Writes one file of the checkpoint, with what the unit `choice` says of every linear.

        The facts say too what the choice loses of each.
        """
        self._choice = choice
        facts = super().write(file)
        names = {tensor["source"] for tensor in file["tensors"] if tensor["part"] == "values"}
        return facts | {
            "errors": {
                linear.name: masked_errors(self._stored_file([linear]), self._chosen(linear))
                for linear in self.task.linears
                if linear.name in names
            }
        }

    def _read(self, tensor: TensorSpec) -> Tensor:
        if tensor.part == "copy":
            return super()._read(tensor)
        linear = next(each for each in self.task.linears if each.name == tensor.source)
        parts = self._chosen(linear)
        if tensor.part == "weight":
            return parts["weight"].T
        if tensor.part == "down":
            return parts["down"]
        positions_N, order_N = parts["positions"].sort()
        if tensor.part == "values":
            return parts["values"][order_N]
        sizes = linear.out_features, linear.in_features
        return encode(tensor.code, positions_N, *sizes)[tensor.part]

    def _chosen(self, linear: Linear) -> Mapping[str, Tensor]:
        """What the choice leaves of a linear; the last one is kept, its tensors come in a row."""
        wanted = (self._choice, linear.name)
        if self._read_last is None or self._read_last[0] != wanted:
            values = read_candidates(self.run, self._choice, linear)
            assert values is not None, f"{linear.name} is dense in the choice"
            parts = read_masked(self._stored_file([linear]), values.chosen(), self.device)
            self._read_last = (wanted, parts)
        return self._read_last[1]
