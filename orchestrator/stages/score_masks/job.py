"""Scoring by losses: the driver's part of CAP's second stage.

Probabilities go out in units of a few MB, masks are drawn where the weights are, and what comes
back of a masked model is its loss and, for every candidate, how many draws were kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.allocate.bernoulli import CandidatePool, Draw
from orchestrator.allocate.budget import budget_values
from orchestrator.allocate.by_bytes import fill_bytes
from orchestrator.allocate.cap import CapAllocator
from orchestrator.allocate.choice import Choice, choose
from orchestrator.errors import InputError
from orchestrator.models.evaluation.scoring import Score
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.plan.plan import Plan
from orchestrator.runtime.calls import Call
from orchestrator.runtime.monitor import RunMonitor, StageMonitor
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.context.masks import commit_candidates
from orchestrator.stages.score_masks.worker import MaskTrial, MaskTrials
from orchestrator.store.files import digest_json
from orchestrator.store.units import unit_key

if TYPE_CHECKING:
    from orchestrator.stages.context.compression import Compression

SCORE_VERSION = 1
"""Raised when a loss, or what is learnt from it, changes."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """What is kept in the end, and how it came about."""

    plan: Plan
    key: str
    """Of the unit with the choice."""
    report: dict[str, Any]


class Scoring:
    """Losses of masked models, each one a unit: what a killed driver has is not taken again."""

    def __init__(
        self,
        job: "Compression",
        candidates: Mapping[str, Candidates],
        workers: WorkerGroup,
        monitor: RunMonitor,
        stage: StageMonitor,
        *,
        itemsize: int,
    ) -> None:
        self._job, self._workers, self._monitor, self._stage = job, workers, monitor, stage
        self._itemsize = itemsize
        allocator = job.allocator
        assert isinstance(allocator, CapAllocator)
        self.allocator: CapAllocator = allocator
        self.pool = self.allocator.pool(job.linears, candidates, job.recipe.share)
        self._counts = self.pool.split(self.pool.count_N)
        self._chunks = min(self.allocator.chunks, job.token_report["sequences"])
        self._done = 0
        self._total = 0

    def learn(self) -> Learnt:
        """Every iteration's losses and step, then the better of the start's choice and the last.

        Raises:
            UsageError, InfeasibleError: As `budget_values` and `fill_bytes`.
            InputError: A loss is not finite.
        """
        cap, pool = self.allocator, self.pool
        # the order of the utilities is all that the budget of a size in bytes depends on
        budget = self._choose(pool.utility_N)[1].budget_values
        share_N = cap.start(pool, budget)
        first, plan = self._choose(share_N)
        if not cap.learns:
            report = {"stage2": False, "kept": _kept(pool, first)}
            return Learnt(plan, self._commit(first.kept_N, first.dense), report)
        self._total = cap.iterations * cap.samples + 2
        baseline, losses, start = cap.new_baseline(), [], math.nan
        for iteration in range(cap.iterations):
            trials = self._drawn_trials(share_N, iteration)
            if iteration == 0:
                # one pass more for the first choice would be one more wave of shards
                (chosen, *draws) = self._losses([self._choice_trial(first), *trials])
                start = chosen.loss
            else:
                draws = self._losses(trials)
            losses.append([draw.loss for draw in draws])
            share_N = cap.step(pool, share_N, draws, baseline, budget)
        last, last_plan = self._choose(share_N)
        (end,) = self._losses([self._choice_trial(last)])
        better = end.loss < start or not cap.keep_better
        taken, plan = (last, last_plan) if better else (first, plan)
        report = {
            "stage2": True,
            "sequences": self._chunks,
            "drawn_losses": losses,
            "initialisation_loss": start,
            "stage2_loss": end.loss,
            "taken": "stage 2" if better else "initialisation",
            "changed": _changes(pool, first, last),
            "kept": _kept(pool, taken),
        }
        return Learnt(plan, self._commit(taken.kept_N, taken.dense), report)

    def _choose(self, share_N: np.ndarray) -> tuple[Choice, Plan]:
        """What the budget holds of the candidates with the largest probabilities."""
        recipe, linears = self._job.recipe, self._job.linears

        def allocate(keep: float) -> Plan:
            budget = budget_values(linears, keep)
            return self.allocator.plan(self.pool, choose(self.pool, share_N, budget), budget)

        plan = (
            allocate(recipe.share)
            if recipe.keep_bytes is None
            else fill_bytes(allocate, linears, recipe.share, self._itemsize)
        )
        return choose(self.pool, share_N, plan.budget_values), plan

    def _commit(self, value_N: np.ndarray, dense: frozenset[str] = frozenset()) -> str:
        parts = self.pool.split(value_N)
        values = {name: part for name, part in parts.items() if name not in dense}
        return commit_candidates(self._job.run, values, self._counts)

    def _choice_trial(self, choice: Choice) -> MaskTrial:
        return MaskTrial(self._commit(choice.kept_N, choice.dense), None)

    def _drawn_trials(self, share_N: np.ndarray, iteration: int) -> list[MaskTrial]:
        key, seed = self._commit(share_N), self._job.recipe.seed
        return [MaskTrial(key, (seed, iteration, each)) for each in range(self.allocator.samples)]

    def _unit_key(self, trial: MaskTrial) -> str:
        job = self._job
        inputs = [job.pass_key, *job.block_keys.values(), trial.candidates_key]
        return unit_key("loss", SCORE_VERSION, inputs, seed=trial.seed, sequences=self._chunks)

    def _losses(self, trials: Sequence[MaskTrial]) -> list[Draw]:
        """The losses of masked models, in one pass those that are not committed."""
        keys = [self._unit_key(trial) for trial in trials]
        units, stage = self._job.run.units, self._stage.name
        found = reusable_units(
            units, {key: key for key in keys}, self._workers, self._monitor, stage
        )
        missing = [trial for trial, key in zip(trials, keys, strict=True) if key not in found]
        self._done += len(trials) - len(missing)
        if missing:
            found |= self._run(missing)
        return [self._draw(trial, found[key]) for trial, key in zip(trials, keys, strict=True)]

    def _draw(self, trial: MaskTrial, facts: Mapping[str, Any]) -> Draw:
        total = Score.from_json(facts["score"])
        loss = total.loss / total.predictions if total.predictions else math.nan
        if not math.isfinite(loss):
            raise InputError(
                f"score: the loss of a masked model is {loss} on {self._chunks} sequences with "
                f"{total.predictions} predictions; calibrate on longer ones, or in float32"
            )
        if trial.seed is None:
            return Draw(np.zeros(0), loss)
        drawn = {name: (np.array(d), np.array(b)) for name, (d, b) in facts["drawn"].items()}
        return Draw(self.pool.join(drawn), loss)

    def _run(self, trials: Sequence[MaskTrial]) -> dict[str, dict[str, Any]]:
        """All sequences of all trials through the shards: for each unit its facts, committed.

        Not resumed within a trial: the counts of its draws come from the shards as it passes, so
        chunks that an earlier attempt left are of no use.
        """
        job, workers = self._job, self._workers
        pass_key = digest_json([self._unit_key(trial) for trial in trials])
        chunks = job.run.chunks(pass_key, workers.environment)
        chunks.clear()
        num_blocks = job.surveyed.num_blocks
        cut = cut_blocks(num_blocks, job.recipe.shards or default_shards(num_blocks, workers.size))
        schedule = ShardPass(
            cut,
            todo=(),
            num_chunks=len(trials) * self._chunks,
            present=[set() for _ in cut],
            results=set(),
            joints=range(num_blocks),
            about=(MaskTrials(pass_key, tuple(trials), self._chunks),),
        )
        scores: dict[int, Score] = {}
        drawn: list[dict[str, Any]] = [{} for _ in trials]
        done: dict[str, dict[str, Any]] = {}

        def on_success(call: Call, value: Any) -> None:
            if call.method == "step":
                index = call.arguments[0]
                number = index // self._chunks
                drawn[number] |= value["drawn"]
                if "score" in value:
                    scores[index] = Score.from_json(value["score"])
                    total = self._sum(scores, number)
                    if total is not None:
                        facts = {"score": total.to_json(), "drawn": drawn[number]}
                        done[self._unit_key(trials[number])] = facts
                        self._finish(trials[number], facts)

        run_pass(workers, self._monitor, schedule, chunks, on_success)
        return done

    def _sum(self, scores: Mapping[int, Score], number: int) -> Score | None:
        """A trial's sequences in their order; nothing while some are under way."""
        total = Score()
        for index in range(number * self._chunks, (number + 1) * self._chunks):
            if index not in scores:
                return None
            total = total.merge(scores[index])
        return total

    def _finish(self, trial: MaskTrial, facts: Mapping[str, Any]) -> None:
        unit = self._job.run.units.begin(self._unit_key(trial))
        unit.commit(environment=self._workers.environment, facts=facts)
        self._done += 1
        self._stage.progress(self._done, self._total, unit="loss of a masked model")


def _kept(pool: CandidatePool, choice: Choice) -> dict[str, int]:
    """Directions, entries and linears that are kept whole, and the values of each."""
    is_dense_N = np.isin(pool.owner_N, [_index(pool, name) for name in choice.dense])
    kept_N = np.where(is_dense_N, 0, choice.kept_N)
    kinds = pool.is_direction_N, ~pool.is_direction_N
    directions, entries = (int(kept_N[kind].sum()) for kind in kinds)
    return {
        "directions": directions,
        "direction_values": int((kept_N * pool.cost_N)[kinds[0]].sum()),
        "entries": entries,
        "of_directions": int(pool.count_N[kinds[0]].sum()),
        "of_entries": int(pool.count_N[kinds[1]].sum()),
        "dense_linears": len(choice.dense),
    }


def _changes(pool: CandidatePool, first: Choice, last: Choice) -> dict[str, int]:
    """What the second choice has that the first had not, and the other way round, in draws and in
    stored values; a dense linear counts as all its candidates."""
    change_N = last.kept_N - first.kept_N
    changes = {}
    for kind, is_kind_N in (
        ("directions", pool.is_direction_N),
        ("entries", ~pool.is_direction_N),
    ):
        part_N, cost_N = change_N[is_kind_N], pool.cost_N[is_kind_N]
        changes[f"{kind}_gained"] = int(part_N.clip(min=0).sum())
        changes[f"{kind}_lost"] = int((-part_N).clip(min=0).sum())
        changes[f"{kind}_values_gained"] = int((part_N.clip(min=0) * cost_N).sum())
        changes[f"{kind}_values_lost"] = int(((-part_N).clip(min=0) * cost_N).sum())
    return changes


def _index(pool: CandidatePool, name: str) -> int:
    return next(index for index, linear in enumerate(pool.linears) if linear.name == name)
