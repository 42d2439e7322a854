"""Remedies if the training of blocks does not fit in memory."""

from orchestrator.recipe.recipe import Recipe


def smaller_blocks(recipe: Recipe) -> str:
    """Settings that reduce the memory of stages that train or compensate blocks."""
    less = ["fewer or shorter sequences (--samples, --sequence-length)"]
    less += ["--compensate none"] if recipe.compensate != "none" else []
    less += ["--refine none"] if recipe.refine != "none" else []
    return ", or ".join(less)
