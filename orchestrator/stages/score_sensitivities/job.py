"""Sensitivities of linears for the rank search of ASVD: the driver's part.

A trial is the model with one linear truncated to one rank. It starts at the dense input of the
linear's block, so that a trial costs half of an evaluation of the model on average. Its chunks pass
the following shards like any other: a shard computes the trials of its own linears, and passes
chunks of trials of earlier shards.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from statistics import median
from typing import Any

from orchestrator.allocate.scored import SensitivityAllocator
from orchestrator.errors import InputError
from orchestrator.models.evaluation.scoring import Score
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.grouping import stack
from orchestrator.plan.linear import Linear
from orchestrator.readable import counted
from orchestrator.runtime.calls import Call, Step
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Scores
from orchestrator.stages.score_sensitivities.worker import CutTrial, CutTrials
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import digest_json
from orchestrator.store.units import unit_key

SENSITIVITY_VERSION = 1
"""Raised when a loss changes."""
BLOCKS = 8
"""Largest number of blocks of a shard if the recipe has no number of shards. Without statistics and
decompositions a block takes a quarter of the memory that calibration assumes, which has two; and
fewer boundaries mean fewer stored chunks of trials."""


class Sensitivities:
    """Losses of the model with one linear truncated; each is a unit, so none is measured twice.

    One pass has all trials. A boundary stores the chunks of the trials that have reached it, at
    most of all trials: 70B with the default grid and windows of 2048 tokens has 2240 trials of
    67 MB, 150 GB if one worker processes shard after shard, and less if later shards are processed
    at the same time. A resumed run continues from these chunks.
    """

    def __init__(
        self, job: Decomposed, allocator: SensitivityAllocator, stage: RunningStage
    ) -> None:
        self._job, self._stage, self._allocator = job, stage, allocator
        self._workers, self._monitor = stage.workers, stage.monitor
        self._chunks = min(allocator.windows, job.sequences)

    def measure(self) -> Scores:
        """Measure all losses that no reusable unit has. Returns all of them.

        Raises:
            InputError: A loss is not finite.
        """
        keys = {trial: self._unit_key(trial) for trial in self._trials}
        scores = {
            trial: Score.from_json(facts["score"])
            for trial, facts in reusable_units(
                self._job.run.units, keys, self._workers, self._monitor, stage=self._stage.name
            ).items()
        }
        if len(scores) < len(keys):
            self._run(keys, scores)
        dense, *cut = self._trials
        losses: dict[str, dict[int, float]] = {}
        for trial in cut:
            losses.setdefault(trial.linears[0], {})[trial.rank] = self._loss(trial, scores[trial])
        report = self._report(self._loss(dense, scores[dense]), losses)
        return Scores(report={"strs": report}, losses=losses)

    @cached_property
    def _linears(self) -> tuple[Linear, ...]:
        """The linears that are truncated together, under the name of the first."""
        return self._job.grouping.stacked(self._job.linears)

    @property
    def _ranks(self) -> AllowedRanks:
        """Ranks of a budget of values, which the allocator divides whatever cost is limited."""
        return self._job.budget.in_values().ranks

    @cached_property
    def _trials(self) -> tuple[CutTrial, ...]:
        """The dense model, then each linear at each rank of the grid, in the model's order."""
        trials = [CutTrial(self._job.survey.num_blocks)]
        for group in self._job.grouping.groups(self._job.linears):
            names = tuple(linear.name for linear in group)
            ranks = self._allocator.ranks(stack(group), self._ranks)
            trials += [CutTrial(group[0].block, names, rank) for rank in ranks]
        return tuple(trials)

    def _unit_key(self, trial: CutTrial) -> str:
        job, inputs = self._job, [self._job.pass_key]
        if trial.linears:
            inputs.append(job.block_keys[job.grouping.first(trial.block)])
        cut = {"linears": trial.linears, "rank": trial.rank}
        return unit_key("sensitivity", SENSITIVITY_VERSION, inputs, sequences=self._chunks, **cut)

    def _loss(self, trial: CutTrial, total: Score) -> float:
        loss = total.loss / total.predictions if total.predictions else math.nan
        if not math.isfinite(loss):
            model = f"with {trial.linears[0]} at rank {trial.rank}" if trial.linears else "as it is"
            raise InputError(
                f"score: the loss of the model {model} is {loss} on "
                f"{counted(self._chunks, 'sequence')} with "
                f"{counted(total.predictions, 'prediction')}; calibrate on longer ones, or in "
                "float32"
            )
        return loss

    def _run(self, keys: Mapping[CutTrial, str], scores: dict[CutTrial, Score]) -> None:
        """Pass the trials without a score through the shards, and commit their scores.

        The dense model is always one of them, because the others start from its chunks; it resumes
        at the last boundary that has its chunks.
        """
        job, workers = self._job, self._workers
        committed = set(scores)
        pass_key = digest_json([*keys.values()])
        chunks = job.run.chunks(pass_key, workers.environment)
        num_blocks, size = job.survey.num_blocks, job.grouping.size
        cut = workers.cut(num_blocks, blocks=BLOCKS, group=size)
        count = len(self._trials) * self._chunks
        done = [trial for trial in self._trials[1:] if trial in scores]
        schedule = ShardPass(
            cut,
            todo=(),
            num_chunks=count,
            present=[chunks.present(each.start, count) | self._starting(each) for each in cut],
            results={index for trial in done for index in self._range(trial)},
            about=(CutTrials(pass_key, self._trials, self._chunks),),
        )
        found: dict[int, Score] = {}

        def on_success(call: Call, value: Any) -> None:
            if not isinstance(call.command, Step) or value is None:
                return
            index = call.command.index
            found[index] = Score.from_json(value)
            trial = self._trials[index // self._chunks]
            if all(each in found for each in self._range(trial)):
                # summed in the order of the sequences
                scores[trial] = _total([found[each] for each in self._range(trial)])
                if trial not in committed:
                    committed.add(trial)
                    self._commit(trial, keys[trial], scores[trial], len(committed))
                self._drop(trial, chunks, cut)

        run_pass(workers, self._monitor, schedule, chunks, on_success=on_success)

    def _range(self, trial: CutTrial) -> range:
        """Indices of the chunks of a trial."""
        start = self._number[trial] * self._chunks
        return range(start, start + self._chunks)

    @cached_property
    def _number(self) -> Mapping[CutTrial, int]:
        return {trial: number for number, trial in enumerate(self._trials)}

    def _starting(self, blocks: range) -> set[int]:
        """Indices of the chunks of trials that start in a shard."""
        return {i for trial in self._trials if trial.block in blocks for i in self._range(trial)}

    def _commit(self, trial: CutTrial, key: str, total: Score, done: int) -> None:
        unit = self._job.run.units.begin(key)
        unit.commit(environment=self._workers.environment, facts={"score": total.to_json()})
        name = f"{trial.linears[0]}, rank {trial.rank}" if trial.linears else "the dense model"
        self._stage.progress(done, len(self._trials), unit=name)

    def _drop(self, trial: CutTrial, chunks: Chunks, cut: tuple[range, ...]) -> None:
        """Remove the chunks of a trial; those of the dense model stay, for other trials."""
        for blocks in cut:
            if trial.linears and blocks.start > trial.block:
                for index in self._range(trial):
                    chunks.drop(blocks.start, index)

    def _report(self, dense: float, losses: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
        """Losses, and for each kept fraction of the grid the increase over the dense loss."""
        added = {}
        for kept in self._allocator.kept:
            by_name = {
                linear.name: losses[linear.name][rank] - dense
                for linear in self._linears
                if (rank := self._allocator.rank(linear, kept, self._ranks))
            }
            if by_name:
                added[str(kept)] = {
                    "least": min(by_name.values()),
                    "median": median(by_name.values()),
                    "most": max(by_name.values()),
                    "most_sensitive": max(by_name, key=lambda name: by_name[name]),
                }
        return {
            "grid": list(self._allocator.kept),
            "sequences": self._chunks,
            "dense_loss": dense,
            "added_loss": added,
            "losses": {
                name: {str(rank): loss for rank, loss in by_rank.items()}
                for name, by_rank in losses.items()
            },
        }


def _total(scores: list[Score]) -> Score:
    """Sum scores of sequences in this order."""
    total = Score()
    for each in scores:
        total = total.merge(each)
    return total
