"""The stages after the plan, each in a folder of its own, and the driver.

A new stage is a folder and a line in `STAGES`; a stage of another package is an entry point.
"""

from orchestrator.errors import UsageError
from orchestrator.recipe.recipe import Recipe
from orchestrator.registry import Registry
from orchestrator.stage_names import FIXED
from orchestrator.stages.base import Stage

STAGES: Registry[type[Stage]] = Registry(
    "orchestrator.stages",
    {
        "refit": "orchestrator.stages.refit.spec:Refit",
        "pivot": "orchestrator.stages.pivot.spec:Pivot",
        "walk": "orchestrator.stages.walk.spec:Walk",
        "refine": "orchestrator.stages.refine.spec:Refine",
        "sweep": "orchestrator.stages.walk.spec:Sweep",
        "train": "orchestrator.stages.train.spec:Train",
    },
    base=Stage,
)
"""All stages after the plan: built-in ones in the order of execution, then those of others."""


def stage_classes(recipe: Recipe) -> tuple[type[Stage], ...]:
    """Built-in stages and those of other packages that the recipe has a table of, in order.

    A stage of another package comes directly after the one that it follows, or at the end; of two
    that follow the same one, the first by name comes first. Others are not imported.

    Raises:
        UsageError: A stage cannot be imported, has the name of a stage that every run has, or
            follows one that is not part of the run.
    """
    ordered = _builtin()
    others = [STAGES[name] for name in _of_others() if name in recipe.options]
    for stage in others:
        if stage.name in FIXED:
            raise UsageError(
                f"{STAGES.distribution(stage.name)}: stage {stage.name!r} has a name that is taken "
                f"by a part of every run, {', '.join(FIXED)}; give it another one"
            )
    while others:
        names = [stage.name for stage in ordered]
        ready = [stage for stage in others if stage.follows in ("", *names)]
        if not ready:
            stage = others[0]
            raise UsageError(
                f"{STAGES.distribution(stage.name)}: stage {stage.name!r} follows "
                f"{stage.follows!r}, which is not part of the run; there are {', '.join(names)}"
            )
        # the last one is put in first, so that it ends up behind the others
        for stage in reversed([each for each in ready if each.follows]):
            names = [each.name for each in ordered]
            ordered.insert(names.index(stage.follows) + 1, stage)
        ordered += [each for each in ready if not each.follows]
        others = [stage for stage in others if stage not in ready]
    return tuple(ordered)


def option_tables() -> frozenset[str]:
    """Tables of a recipe with options of stages."""
    own = {table for stage in _builtin() for table in stage.option_tables()}
    return frozenset({*own, *_of_others()})


def _builtin() -> list[type[Stage]]:
    return [STAGES[name] for name in STAGES if not STAGES.distribution(name)]


def _of_others() -> list[str]:
    """Names of the stages of other packages."""
    return [name for name in STAGES if STAGES.distribution(name)]
