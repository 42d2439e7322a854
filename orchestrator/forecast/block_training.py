"""Work of the training of blocks, and remedies if it does not fit in memory."""

from orchestrator.forecast.stage_cost import Setting
from orchestrator.forecast.work import Work, trained
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.recipe.recipe import Recipe


def epochs(setting: Setting, options: RefineOptions) -> Work:
    """Training of one block towards its dense outputs."""
    step = trained(setting.shapes, setting.kept, setting.tokens)
    return Work(single=setting.sequences * options.epochs * step)


def smaller_blocks(recipe: Recipe) -> str:
    """Settings that reduce the memory of stages that train or compensate blocks."""
    less = ["fewer or shorter sequences (--samples, --sequence-length)"]
    less += ["--compensate none"] if recipe.compensate != "none" else []
    less += ["--refine none"] if recipe.refine != "none" else []
    return ", or ".join(less)
