"""Search for the plan of the least loss on held-out text: the driver's part.

Points are chosen in batches of a fixed size and told in the order of their choice, so that seed and
batch decide the course, and neither workers nor the order in which they end. The points of a batch
are a unit, committed before any of them is measured, and every loss is one: a search that was
stopped goes on as if it had not been, and one with more trials goes on where a shorter one ended.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

from orchestrator.allocate.scored import PlanAllocator
from orchestrator.allocate.threshold import Threshold
from orchestrator.errors import InputError
from orchestrator.models.evaluation.scoring import Score
from orchestrator.plan.plan import Plan
from orchestrator.progress.tally import Ahead
from orchestrator.runtime.calls import Call, Step
from orchestrator.runtime.resume import reusable_units
from orchestrator.runtime.run_pass import run_pass
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Dividing, Scores
from orchestrator.stages.score_plans.sampler import Point, ask
from orchestrator.stages.score_plans.worker import PlanTrial, PlanTrials
from orchestrator.store.files import digest_json
from orchestrator.store.units import unit_key

TARGETS_VERSION = 1
"""Raised when the distributions of the dense model change."""
POINTS_VERSION = 1
"""Raised when the choice of points changes."""
LOSS_VERSION = 1
"""Raised when the loss of a plan changes."""
STARTS = 3
"""Plans of closed forms, the first ones of a search."""


@dataclass(frozen=True, slots=True)
class TriedPlan:
    """A plan with its loss."""

    origin: str
    point: Point | None
    """None for a plan outside the space that is searched."""
    plan: Plan
    loss: float = math.nan
    """Mean cross-entropy, with the weighted divergence, in nats; may be infinite or NaN."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


class PlanSearch:
    """Rounds of asking for points, measuring their plans and telling the losses."""

    def __init__(
        self,
        job: Decomposed,
        allocator: PlanAllocator,
        stage: RunningStage,
        dividing: Dividing,
    ) -> None:
        assert job.held_out is not None
        self._job, self._stage, self._allocator = job, stage, allocator
        self._workers, self._monitor = stage.workers, stage.monitor
        self._dividing, self._text = dividing, job.held_out
        self._bounds = allocator.bounds(dividing.linears)
        self._tried: list[TriedPlan] = []

    def search(self) -> Scores:
        """Measure all plans; the one of the least loss is the plan, the first one among equals.

        Raises:
            InfeasibleError: As the allocator and `fill_budget`.
            InputError: No loss is finite.
        """
        starts, batch = self._starts(), self._allocator.batch
        if self._targets:
            self._make_targets()
        # without a coordinate there is nothing to choose
        total = self._allocator.trials if self._bounds else len(starts)
        for first in range(0, total, batch):
            given = starts[first : first + batch]
            points = self._points(first // batch, batch - len(given)) if self._bounds else []
            asked = [self._at(point, "asked") for point in points]
            self._tried += self._measured([*given, *asked][: total - first], total)
            if not any(each.is_finite for each in self._tried):
                raise InputError(
                    f"score: none of the first {len(self._tried)} plans has a finite loss on "
                    f"{self._allocator.text}; keep more, or give a method that loses less"
                )
        best = min((each for each in self._tried if each.is_finite), key=lambda each: each.loss)
        report = self._report(best)
        self._monitor.note(_sentence(report))
        return Scores(report={"search": report}, plan=best.plan)

    def _starts(self) -> list[TriedPlan]:
        """The closed-form plans: even and by the curves, and that of the curves by group.

        That of the curves is outside the space, whose linears of a group keep equal fractions.
        """
        linears, curves, cosines, filled = self._dividing
        even = self._at(self._allocator.even(linears, self._job.budget), "even")
        closed = filled(lambda budget: Threshold()(linears, curves, budget, cosines))
        by_group = self._at(self._allocator.locate(linears, closed), "threshold by group")
        return [even, TriedPlan("threshold", None, closed), by_group]

    def _at(self, point: Point, origin: str) -> TriedPlan:
        """The plan of a point."""
        linears, curves, _, filled = self._dividing
        plan = filled(lambda budget: self._allocator.plan(linears, curves, budget, point))
        return TriedPlan(origin, point, plan)

    def _points(self, number: int, count: int) -> list[Point]:
        """The points of a batch: those of its unit, or new ones, which are committed.

        They follow from the losses of all batches before, which are in the name of the unit.
        """
        job, units, told = self._job, self._job.run.units, told_losses(self._tried)
        allocator, seed = self._allocator, job.randomness.points(number)
        about = {"bounds": self._bounds, "count": count, "sampler": allocator.sampler, "seed": seed}
        key = unit_key("search-points", POINTS_VERSION, [], told=digest_json(told), **about)
        found = reusable_units(
            units, {"points": key}, self._workers, self._monitor, stage=self._stage.name
        )
        if not found and count:
            asked = ask(told, self._bounds, count, sampler=allocator.sampler, seed=seed)
            found = {"points": {"points": asked}}
            unit = units.begin(key)
            unit.commit(environment=self._workers.environment, facts=found["points"])
        return [tuple(point) for each in found.values() for point in each["points"]]

    def _measured(self, batch: Sequence[TriedPlan], total: int) -> list[TriedPlan]:
        """The plans of a batch with their losses; those without a reusable unit pass together."""
        trials = [_trial(each.plan) for each in batch]
        keys = [self._loss_key(trial) for trial in trials]
        found = reusable_units(
            self._job.run.units,
            {key: key for key in keys},
            self._workers,
            self._monitor,
            stage=self._stage.name,
        )
        # equal plans are measured once
        distinct = dict(zip(keys, trials, strict=True))
        if len(found) < len(distinct):
            self._run(distinct, found, total)
        return [
            replace(each, loss=self._loss(found[key]))
            for each, key in zip(batch, keys, strict=True)
        ]

    @cached_property
    def _targets(self) -> tuple[str, ...]:
        """Keys of the dense model's distributions, by sequence; none if their weight is 0."""
        inputs = [self._job.pass_key, self._text.key]
        return tuple(
            unit_key("search-targets", TARGETS_VERSION, inputs, sequence=sequence)
            for sequence in range(self._text.sequences if self._allocator.divergence else 0)
        )

    def _make_targets(self) -> None:
        """Pass the text through the dense model, unless all of its distributions are there."""
        job, workers, monitor = self._job, self._workers, self._monitor
        keys = dict(enumerate(self._targets))
        there = reusable_units(job.run.units, keys, workers, monitor, stage=self._stage.name)
        if len(there) == len(keys):
            return
        pass_key = digest_json(self._targets)
        chunks = job.run.chunks(pass_key, workers.environment)
        cut = workers.cut(job.survey.num_blocks)
        about = self._about(pass_key, (PlanTrial(),))
        schedule = ShardPass(
            cut,
            todo=(),
            num_chunks=len(keys),
            present=[chunks.present(each.start, len(keys)) for each in cut],
            results=set(there),
            joints=range(job.survey.num_blocks),
            about=(replace(about, makes_targets=True),),
        )
        run_pass(workers, monitor, schedule, chunks)

    def _about(self, pass_key: str, trials: tuple[PlanTrial, ...]) -> PlanTrials:
        """The request for a pass of these models on the text."""
        text = self._text
        return PlanTrials(pass_key, text.key, trials, text.sequences, targets=self._targets)

    def _loss_key(self, trial: PlanTrial) -> str:
        job = self._job
        inputs = [job.pass_key, *job.block_keys.values(), self._text.key, *self._targets]
        return unit_key("plan-loss", LOSS_VERSION, inputs, ranks=digest_json(trial.ranks))

    def _loss(self, facts: Mapping[str, Any]) -> float:
        """Mean cross-entropy of a model, and the weighted mean divergence, in nats."""
        total = Score.from_json(facts["score"])
        loss = total.loss + self._allocator.divergence * total.divergence
        return loss / total.predictions if total.predictions else math.nan

    def _run(
        self, trials: Mapping[str, PlanTrial], found: dict[str, dict[str, Any]], total: int
    ) -> None:
        """Pass the text through the models without a loss, and commit and add their losses.

        A resumed pass continues from the chunks that are stored at the boundaries.
        """
        workers, sequences = self._workers, self._text.sequences
        names, num_blocks = [*trials], self._job.survey.num_blocks
        pass_key = digest_json(names)
        chunks = self._job.run.chunks(pass_key, workers.environment)
        cut, count = workers.cut(num_blocks), len(names) * sequences
        ranges = {
            name: range(at * sequences, (at + 1) * sequences) for at, name in enumerate(names)
        }
        schedule = ShardPass(
            cut,
            todo=(),
            num_chunks=count,
            present=[chunks.present(each.start, count) for each in cut],
            results={index for name in found for index in ranges[name]},
            joints=range(num_blocks),
            about=(self._about(pass_key, tuple(trials.values())),),
        )
        scores: dict[int, Score] = {}

        def on_success(call: Call, value: Any) -> None:
            if not isinstance(call.command, Step) or value is None:
                return
            scores[call.command.index] = Score.from_json(value)
            name = names[call.command.index // sequences]
            if name not in found and all(index in scores for index in ranges[name]):
                # summed in the order of the sequences
                score = reduce(Score.merge, (scores[index] for index in ranges[name]))
                found[name] = {"score": score.to_json()}
                unit = self._job.run.units.begin(name)
                unit.commit(environment=workers.environment, facts=found[name])
                self._stage.progress(len(self._tried) + len(found), total, unit="loss of a plan")

        later = max(total - len(self._tried) - len(names), 0) * sequences
        head = len(cut[-1])
        to_do = {"open": num_blocks, "forward": later * (num_blocks - head), "score": later * head}
        ahead = Ahead(to_do=to_do if later else {}, count=later * len(cut))
        run_pass(workers, self._monitor, schedule, chunks, on_success=on_success, ahead=ahead)

    def _report(self, best: TriedPlan) -> dict[str, Any]:
        """All trials with their losses; what the best one gains over the closed forms."""
        linears, allocator = self._dividing.linears, self._allocator
        losses = {each.origin: each.loss for each in self._tried[:STARTS] if each.is_finite}
        return {
            "text": dict(self._text.report),
            "groups": [*allocator.kept(linears, best.plan)],
            "trials": [
                {
                    "origin": each.origin,
                    "point": each.point,
                    "kept": [*allocator.kept(linears, each.plan).values()],
                    "stored": each.plan.stored_values,
                    # a loss that is not finite was told as the worst finite one so far
                    "loss": each.loss if each.is_finite else None,
                }
                for each in self._tried
            ],
            "not_finite": sum(not each.is_finite for each in self._tried),
            "best": self._tried.index(best),
            "loss": best.loss,
            "gains": {origin: loss - best.loss for origin, loss in losses.items()},
        }


def told_losses(tried: Sequence[TriedPlan]) -> list[tuple[Point, float]]:
    """Points with their losses, in the order of their choice.

    Those that are not finite have the worst finite loss so far; there is one.
    """
    worst = max((each.loss for each in tried if each.is_finite), default=math.nan)
    return [
        (each.point, each.loss if each.is_finite else worst)
        for each in tried
        if each.point is not None
    ]


def _trial(plan: Plan) -> PlanTrial:
    """The trial of a plan: ranks of the linears that it cuts."""
    assignments = plan.assignments.items()
    return PlanTrial({name: each.rank for name, each in assignments if each.form != "dense"})


def _sentence(report: Mapping[str, Any]) -> str:
    """Line about the result of a search."""
    origin = report["trials"][report["best"]]["origin"]
    gains = ", ".join(f"{gain:.4f} below {name}" for name, gain in report["gains"].items())
    lost = f"; {report['not_finite']} were not finite" if report["not_finite"] else ""
    return (
        f"search: plan {report['best'] + 1} of {len(report['trials'])} ({origin}) has the least "
        f"loss, {report['loss']:.4f}: {gains}{lost}"
    )
