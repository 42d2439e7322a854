"""Gains of the directions that the plan of a budget keeps, learned after the scores."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from orchestrator.allocate.gates.scores import plan_of_scores
from orchestrator.allocate.gates.soco import Soco
from orchestrator.plan.plan import Plan
from orchestrator.stages.context.decompose import compression_task
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.values import Decomposed, Dividing, Scores
from orchestrator.stages.learn.schedule import Counts, LearnPipeline
from orchestrator.stages.learn.steps import LEARN_VERSION, GateSteps
from orchestrator.stages.learn.worker import LearnSettings, LearnWorker
from orchestrator.store.units import unit_key


class GainLearning(GateSteps):
    """Gains of the directions of one plan, a unit for each block that has a linear that is cut.

    The model is the one that the plan compresses to, with a gate for each direction that it keeps.
    The keys of the units hold the ranks of the plan, and no size.

    Args:
        orders: Keys of the units of scores, by block.
    """

    def __init__(
        self, job: Decomposed, soco: Soco, plan: Plan, *, orders: Mapping[int, str]
    ) -> None:
        self._plan, self._orders = plan, orders
        self._ranks = {
            name: each.rank for name, each in plan.assignments.items() if each.form != "dense"
        }
        super().__init__(
            job,
            soco.of_gains(),
            key=unit_key("gains", LEARN_VERSION, [*orders.values()], ranks=self._ranks),
            blocks=sorted({each.block for each in job.linears if each.name in self._ranks}),
            of="gains",
        )

    @property
    def task(self) -> CompressionTask:
        """The task of the workers, who read directions in the order of their scores."""
        settings = LearnSettings(
            options=self._course.options,
            penalty_by=self._allocator.penalty_by,
            randomness=self._job.randomness,
            gates="gains",
            keys=self.keys,
            target_keys=self._target_keys,
            ranks=self._ranks,
        )
        task = compression_task(self._job, pass_key=self._key, settings=settings)
        return replace(task, order_keys=self._orders)

    def learn(self, stage: RunningStage) -> dict[str, Any]:
        """Learn the gains that no reusable unit has. Returns their facts.

        Raises:
            InputError: A loss or a gradient is not finite.
        """
        done = self.committed(stage)
        if done.keys() != self.keys.keys():
            workers = stage.workers.reassigned(LearnWorker, self.task)
            self.perform(replace(stage, workers=workers), done)
        return dict(next(iter(done.values()), {}))

    def _kept(self, counts: Counts) -> float:
        return self._plan.stored_values / sum(each.values for each in self._job.linears)

    def _facts(self, pipeline: LearnPipeline) -> dict[str, Any]:
        return {
            "steps": pipeline.step,
            "kept": pipeline.sizes[pipeline.step],
            "gains": sum(self._ranks.values()),
            "snapshots": [asdict(each) for each in pipeline.snapshots],
        }


def with_gains(job: Decomposed, scores: Scores, dividing: Dividing, stage: RunningStage) -> Scores:
    """Learn the gains of all budgets of the allocator; gives the scores with those of the size.

    Args:
        dividing: With the curves of the scores.

    Raises:
        InputError: As `GainLearning.learn`.
    """
    soco, budgets, facts = job.allocator, {}, {}
    assert isinstance(soco, Soco)  # no other allocator has such budgets
    for kept in soco.gain_budgets:
        budget = job.budget.in_values(kept)
        plan = plan_of_scores(dividing.linears, dividing.curves, budget)
        learning = GainLearning(job, soco, plan, orders=scores.orders)
        budgets[kept], facts[str(kept)] = learning.keys, learning.learn(stage)
    taken = soco.gain_budget(job.budget.kept)
    gains = {} if taken is None else budgets[taken]
    of_budgets = {"budgets": facts, "gains_of": taken, "gains": bool(gains)}
    report = {**scores.report, "learn": {**scores.report["learn"], **of_budgets}}
    return replace(scores, report=report, gains=gains)
