"""Scoring: losses of the model that the allocator asks for, and the workers that take them."""

from orchestrator.allocate.base import Scoring
from orchestrator.stages.context.compress_worker import CompressionWorker
from orchestrator.stages.context.curvature_worker import CurvatureWorker
from orchestrator.stages.context.running_stage import RunningStage
from orchestrator.stages.context.values import Asked, Decomposed, Scores
from orchestrator.stages.score_masks.job import MaskScoring
from orchestrator.stages.score_masks.worker import ScoreWorker
from orchestrator.stages.score_sensitivities.job import Sensitivities
from orchestrator.stages.score_sensitivities.worker import (
    CurvatureSensitivityWorker,
    SensitivityWorker,
)


def worker_class(asked: Asked) -> type[CompressionWorker]:
    """Class of the workers that calibrate, decompose and score."""
    with_gradients = asked.needs_gradients
    match asked.allocator.scoring:
        case Scoring.SENSITIVITIES:
            return CurvatureSensitivityWorker if with_gradients else SensitivityWorker
        case Scoring.MASKS if not with_gradients:
            return ScoreWorker
    return CurvatureWorker if with_gradients else CompressionWorker


def score(decomposed: Decomposed, stage: RunningStage) -> Scores:
    """Take the losses, and learn from those of masked models which candidates are kept.

    Raises:
        InputError: A loss is not finite.
        UsageError, InfeasibleError: As the allocator.
    """
    if decomposed.allocator.scoring is Scoring.SENSITIVITIES:
        return Sensitivities(decomposed, stage).measure()
    return MaskScoring(decomposed, stage).learn()
