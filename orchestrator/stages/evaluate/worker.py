"""The worker of `evaluate`: the same blocks of one or two models side by side."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.device.malloc import return_freed_memory
from orchestrator.device.timing import Stopwatch
from orchestrator.device.transport import Departure
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.evaluation.speed import decode_seconds
from orchestrator.models.shards.chunk import Chunk, pack_many, split_record
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.runtime.worker import Emitted, Task, Worker
from orchestrator.stages.context.tokens import TokenArrays, first_chunk, read_tokens
from orchestrator.store.places import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTask(Task):
    """Task of the workers of one evaluation."""

    models: Mapping[str, Place]
    """`model`, and `against` if there is another to compare with."""
    dtype: torch.dtype | None
    tokens_key: str
    score_keys: tuple[str, ...]
    """Key of the unit with the score, by sequence."""


class EvaluationWorker(Worker):
    """Holds the same shard of every model; never a whole one, unless that is the cut."""

    def __init__(self, task: EvaluationTask) -> None:
        super().__init__(task, unpack=Chunk.unpack, fingerprint=fingerprint_of)
        self.task = task
        self._lazy_models: dict[str, LazyModel] = {}
        self._shards: dict[str, Shard] = {}
        self._tokens: TokenArrays | None = None
        self._decode_measured = False

    def open(self, blocks: tuple[int, int], todo: tuple[int, ...]) -> None:
        """Loads the same blocks of every model."""
        for shard in self._shards.values():
            shard.close()
        return_freed_memory()
        if self._tokens is None:
            self._tokens = read_tokens(self.run, self.task.tokens_key)
            for name, path in self.task.models.items():
                dtype, device = self.task.dtype, self.device
                self._lazy_models[name] = LazyModel.open(path, dtype=dtype, device=device)
        self._shards = {
            name: lazy_model.shard(range(*blocks)) for name, lazy_model in self._lazy_models.items()
        }
        self._decode_measured = False

    def step(self, index: int, emit: bool, record: Emitted) -> tuple[Any, Emitted]:
        """Passes one sequence through every model's blocks; behind the last ones, its score.

        The small result is the time that each model took, and on the first step of a shard the
        time of a decoding step. The model that is first changes from sequence to sequence.
        """
        chunks = self._inputs(index, record)
        first = next(iter(self._shards.values()))
        timings: dict[str, Any] = {"prefill": {}, "decode": {}}
        passed: dict[str, Any] = {}
        if not self._decode_measured:
            timings["decode"] = decode_seconds(self._shards, chunks, self.device)
            self._decode_measured = True
        watch = Stopwatch(self.device)
        for name in [*self._shards][:: -1 if index % 2 else 1]:
            shard = self._shards[name]
            start = watch.now()
            run = shard.logits if shard.is_last else shard.forward
            passed[name] = run(chunks[name])
            timings["prefill"][name] = watch.now() - start
        if first.is_last:
            self._commit_score(index, chunks["model"], passed)
            return timings, None
        departure = Departure()
        records = pack_many({name: passed[name] for name in self._shards}, departure)
        self.store(first.blocks.stop, index, records, departure)
        return timings, records

    def _inputs(self, index: int, record: Emitted) -> dict[str, Chunk]:
        """The chunk of every model at the shard's input."""
        boundary = next(iter(self._shards.values())).blocks.start
        if boundary == 0:
            assert self._tokens is not None
            chunk = first_chunk(self._tokens, index)
            return dict.fromkeys(self._shards, chunk)
        parts = split_record(self.input_record(boundary, index, record), self._shards)
        return {name: self.unpack(part) for name, part in parts.items()}

    def _commit_score(self, index: int, chunk: Chunk, logits: Mapping[str, torch.Tensor]) -> None:
        result = score(
            chunk.tokens,
            chunk.mask,
            logits["model"],
            logits.get("against"),
            predicting_BT=chunk.predicting,
        )
        unit = self.run.units.begin(self.task.score_keys[index])
        unit.commit(environment=self.environment(), facts=result.to_json())


def tokens_per_second(tokens: int, seconds_by_shard: Mapping[int, list[float]]) -> float | None:
    """Speed of the whole model: its shards' median times, one after the other."""
    if not seconds_by_shard or not all(seconds_by_shard.values()):
        return None
    return tokens / sum(statistics.median(seconds) for seconds in seconds_by_shard.values())
