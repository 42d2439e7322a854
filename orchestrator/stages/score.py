"""Scoring: losses of the model that the allocator asks for."""

from orchestrator.allocate.base import Scoring
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Decomposed, Scores
from orchestrator.stages.score_masks.job import MaskScoring
from orchestrator.stages.score_sensitivities.job import Sensitivities


def score(decomposed: Decomposed, stage: RunningStage) -> Scores:
    """Take the losses, and learn from those of masked models which candidates are kept.

    Raises:
        InputError: A loss is not finite.
        UsageError, InfeasibleError: As the allocator.
    """
    if decomposed.allocator.scoring is Scoring.SENSITIVITIES:
        return Sensitivities(decomposed, stage).measure()
    return MaskScoring(decomposed, stage).learn()
