"""Scoring: losses of the model, or learned scores, that the allocator asks for."""

from orchestrator.allocate.base import Scoring
from orchestrator.allocate.gates.base import GateAllocator
from orchestrator.allocate.scored import MaskAllocator, PlanAllocator, SensitivityAllocator
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.allocate import dividing
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Scores
from orchestrator.stages.learn.gains import with_gains
from orchestrator.stages.learn.job import Learning
from orchestrator.stages.learn.worker import LearnWorker
from orchestrator.stages.score_masks.job import MaskScoring
from orchestrator.stages.score_plans.job import PlanSearch
from orchestrator.stages.score_sensitivities.job import Sensitivities


def scoring_workers(decomposed: Decomposed, workers: WorkerGroup) -> WorkerGroup:
    """Give the workers the task of the scoring, where it differs from that of the calibration."""
    allocator = decomposed.allocator
    if allocator.scoring is not Scoring.GATES:
        return workers
    assert isinstance(allocator, GateAllocator)  # checked by `make_allocator`
    return workers.reassigned(
        LearnWorker, Learning(decomposed, allocator, dividing(decomposed, Scores())).task
    )


def score(decomposed: Decomposed, stage: RunningStage) -> Scores:
    """Measure the losses and search for the plan of the least one, or learn from those of masked
    or gated models what is kept.

    Raises:
        InputError: A loss or a gradient is not finite.
        UsageError, InfeasibleError: As the allocator.
    """
    allocator = decomposed.allocator
    if allocator.scoring is Scoring.SENSITIVITIES:
        assert isinstance(allocator, SensitivityAllocator)  # checked by `make_allocator`
        return Sensitivities(decomposed, allocator, stage).measure()
    if allocator.scoring is Scoring.PLANS:
        assert isinstance(allocator, PlanAllocator)
        return PlanSearch(decomposed, allocator, stage, dividing(decomposed, Scores())).search()
    if allocator.scoring is Scoring.GATES:
        assert isinstance(allocator, GateAllocator)
        scores = Learning(decomposed, allocator, dividing(decomposed, Scores())).learn(stage)
        if not allocator.gain_budgets:
            return scores
        return with_gains(decomposed, scores, dividing(decomposed, scores), stage)
    assert isinstance(allocator, MaskAllocator)
    return MaskScoring(decomposed, allocator, stage).learn()
