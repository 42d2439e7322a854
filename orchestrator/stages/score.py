"""Scoring: losses of the model that the allocator asks for."""

from orchestrator.allocate.base import Scoring
from orchestrator.allocate.scored import MaskAllocator, PlanAllocator, SensitivityAllocator
from orchestrator.stages.allocate import dividing
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Scores
from orchestrator.stages.score_masks.job import MaskScoring
from orchestrator.stages.score_plans.job import PlanSearch
from orchestrator.stages.score_sensitivities.job import Sensitivities


def score(decomposed: Decomposed, stage: RunningStage) -> Scores:
    """Measure the losses, and learn from those of masked models which candidates are kept, or
    search for the plan of the least loss.

    Raises:
        InputError: A loss is not finite.
        UsageError, InfeasibleError: As the allocator.
    """
    allocator = decomposed.allocator
    if allocator.scoring is Scoring.SENSITIVITIES:
        assert isinstance(allocator, SensitivityAllocator)  # checked by `make_allocator`
        return Sensitivities(decomposed, allocator, stage).measure()
    if allocator.scoring is Scoring.PLANS:
        assert isinstance(allocator, PlanAllocator)
        return PlanSearch(decomposed, allocator, stage, dividing(decomposed)).search()
    assert isinstance(allocator, MaskAllocator)
    return MaskScoring(decomposed, allocator, stage).learn()
