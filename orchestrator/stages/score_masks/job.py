"""Scoring by losses: the driver's part of CAP's second stage.

Probabilities are sent in units of a few MB and masks are drawn where the weights are; the result
of a masked model is its loss and, for every candidate, the number of kept draws.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.fill import fill_budget
from orchestrator.allocate.scored import MaskAllocator
from orchestrator.allocate.sparsity.bernoulli import CandidatePool, Draw
from orchestrator.allocate.sparsity.choice import Choice, choose
from orchestrator.errors import InputError
from orchestrator.models.evaluation.scoring import Score
from orchestrator.plan.plan import Plan
from orchestrator.progress.tally import Ahead
from orchestrator.readable import counted
from orchestrator.runtime.calls import Call, Step
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.masks import commit_candidates
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Scores
from orchestrator.stages.score_masks.worker import MaskTrial, MaskTrials
from orchestrator.store.files import digest_json
from orchestrator.store.units import unit_key

SCORE_VERSION = 1
"""Raised when a loss, or the step that follows from it, changes."""


class MaskScoring:
    """Losses of masked models, each one a unit, so that none is taken twice after a restart."""

    def __init__(self, job: Decomposed, allocator: MaskAllocator, stage: RunningStage) -> None:
        self._job, self._stage, self.allocator = job, stage, allocator
        self._workers, self._monitor = stage.workers, stage.monitor
        candidates = {name: job.method.kind.curve(facts) for name, facts in job.results.items()}
        self.pool = self.allocator.pool(job.linears, candidates, job.budget)
        self._counts = self.pool.split(self.pool.count_N)
        self._chunks = min(self.allocator.chunks, job.sequences)
        self._done = 0
        self._total = 0

    def learn(self) -> Scores:
        """Every iteration's losses and step, then the better of the start's choice and the last.

        Raises:
            InfeasibleError: As `Budget.total` and `fill_budget`.
            InputError: A loss is not finite.
        """
        cap, pool = self.allocator, self.pool
        # the order of the utilities is all that the budget of a size in bytes depends on
        budget = self._choose(pool.utility_N)[1].budget_values
        probability_N = cap.start(pool, budget)
        first, plan = self._choose(probability_N)
        if not cap.learns:
            report = {"stage2": False, "kept": _kept(pool, first)}
            return self._scores(first, plan, report)
        self._total = cap.iterations * cap.samples + 2
        baseline, losses, start = cap.new_baseline(), [], math.nan
        for iteration in range(cap.iterations):
            trials = self._drawn_trials(probability_N, iteration)
            if iteration == 0:
                # one pass more for the first choice would be one more wave of shards
                (chosen, *draws) = self._losses([self._choice_trial(first), *trials])
                start = chosen.loss
            else:
                draws = self._losses(trials)
            losses.append([draw.loss for draw in draws])
            probability_N = cap.step(pool, probability_N, draws, baseline, budget=budget)
        last, last_plan = self._choose(probability_N)
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
        return self._scores(taken, plan, report)

    def _scores(self, choice: Choice, plan: Plan, report: Mapping[str, Any]) -> Scores:
        key = self._commit(choice.kept_N, choice.dense)
        return Scores(report={"cap": report}, plan=plan, choice=(key,))

    def _choose(self, probability_N: np.ndarray) -> tuple[Choice, Plan]:
        """The candidates with the largest probabilities that fit in the budget, and their plan."""
        job = self._job

        def divide(budget: Budget) -> Plan:
            total = budget.total(job.linears)
            return self.allocator.plan(self.pool, choose(self.pool, probability_N, total), total)

        plan = fill_budget(divide, job.linears, job.budget, job.codec)
        return choose(self.pool, probability_N, plan.budget_values), plan

    def _commit(self, value_N: np.ndarray, dense: frozenset[str] = frozenset()) -> str:
        parts = self.pool.split(value_N)
        values = {name: part for name, part in parts.items() if name not in dense}
        return commit_candidates(self._job.run, values, self._counts)

    def _choice_trial(self, choice: Choice) -> MaskTrial:
        return MaskTrial(self._commit(choice.kept_N, choice.dense), None)

    def _drawn_trials(self, probability_N: np.ndarray, iteration: int) -> list[MaskTrial]:
        key, mask = self._commit(probability_N), self._job.randomness.mask
        return [MaskTrial(key, mask(iteration, each)) for each in range(self.allocator.samples)]

    def _unit_key(self, trial: MaskTrial) -> str:
        job = self._job
        inputs = [job.pass_key, *job.block_keys.values(), trial.candidates_key]
        return unit_key("loss", SCORE_VERSION, inputs, seed=trial.seed, sequences=self._chunks)

    def _losses(self, trials: Sequence[MaskTrial]) -> list[Draw]:
        """Losses of masked models; those that are not committed are taken in one pass."""
        keys = [self._unit_key(trial) for trial in trials]
        units, stage = self._job.run.units, self._stage.name
        found = reusable_units(
            units, {key: key for key in keys}, self._workers, self._monitor, stage=stage
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
                f"score: the loss of a masked model is {loss} on "
                f"{counted(self._chunks, 'sequence')} with "
                f"{counted(total.predictions, 'prediction')}; calibrate on longer ones, or in "
                "float32"
            )
        if trial.seed is None:
            return Draw(np.zeros(0), loss)
        drawn = {name: (np.array(d), np.array(b)) for name, (d, b) in facts["drawn"].items()}
        return Draw(self.pool.join(drawn), loss)

    def _run(self, trials: Sequence[MaskTrial]) -> dict[str, dict[str, Any]]:
        """Pass all sequences of all trials through the shards; gives the facts of the new units.

        Not resumed within a trial: the counts of its draws come from the shards as it passes, so
        chunks that an earlier attempt left are of no use.
        """
        job, workers = self._job, self._workers
        pass_key = digest_json([self._unit_key(trial) for trial in trials])
        chunks = job.run.chunks(pass_key, workers.environment)
        chunks.clear()
        num_blocks = job.survey.num_blocks
        cut = workers.cut(num_blocks)
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
            if isinstance(call.command, Step):
                index = call.command.index
                number = index // self._chunks
                drawn[number] |= value["drawn"]
                if "score" in value:
                    scores[index] = Score.from_json(value["score"])
                    total = self._sum(scores, number)
                    if total is not None:
                        facts = {"score": total.to_json(), "drawn": drawn[number]}
                        done[self._unit_key(trials[number])] = facts
                        self._finish(trials[number], facts)

        later = (self._total - self._done - len(trials)) * self._chunks
        head = len(cut[-1])
        to_do = {"open": num_blocks, "forward": later * (num_blocks - head), "score": later * head}
        ahead = Ahead(to_do=to_do if later else {}, count=later * len(cut))
        run_pass(workers, self._monitor, schedule, chunks, on_success=on_success, ahead=ahead)
        return done

    def _sum(self, scores: Mapping[int, Score], number: int) -> Score | None:
        """Sum over a trial's sequences in their order; None until all are scored."""
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
    """Numbers of kept directions, entries and whole linears, and their values."""
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
    """Candidates gained and lost from the first choice to the second, in draws and stored values.

    A dense linear counts as all its candidates.
    """
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
