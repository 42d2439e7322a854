"""The request of a compression: the resolved recipe, and the places that it names."""

from dataclasses import asdict
from pathlib import Path

from orchestrator.allocate.base import Scoring
from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.output import check_out
from orchestrator.models.survey.locate import locate
from orchestrator.recipe.presets import DEFAULT_PRESET
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import ResolvedRecipe
from orchestrator.stages.context.previous_run import PreviousRun
from orchestrator.stages.context.run_places import places_of
from orchestrator.stages.context.values import Asked
from orchestrator.stages.score_plans.sampler import check_installed
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory


def ask(recipe: Recipe, resolved: ResolvedRecipe, previous: PreviousRun | None = None) -> Asked:
    """Locate the model, and check the output and the run directory; nothing is written.

    Raises:
        UsageError: The output or the run directory holds something else, or lies in the model or in
            the other one; Optuna is needed and not installed.
        InputError: The model is not found.
    """
    if resolved.allocator.scoring is Scoring.PLANS:
        check_installed()
    if previous is None:
        model, base_model = _model(recipe)
    else:
        model, base_model = previous.model, previous.base_model
    out, root = places_of(recipe, model)
    check_out(out)
    run = RunDirectory(root)
    run.check()
    if previous is None:
        _check_default(run, recipe, resolved)
    about = {"out": str(out), "model": str(model), "base_model": base_model}
    return Asked(
        recipe=resolved.recipe,
        description={
            "recipe": asdict(recipe),
            "compressed": asdict(recipe) if previous is None else previous.recipe,
            **about,
        },
        method=resolved.method,
        allocator=resolved.allocator,
        budget=resolved.budget,
        latency_table=resolved.latency_table,
        model=model,
        base_model=base_model,
        out=out,
        run=run,
        previous=previous,
    )


def _check_default(run: RunDirectory, recipe: Recipe, resolved: ResolvedRecipe) -> None:
    """Raise UsageError if a recipe that names no method would leave a run of another one.

    The default method is not that of version 0.1, whose runs hold the name of theirs.
    """
    if recipe.method is not None or not run.marker.exists():
        return
    try:
        written = run.description().get("recipe")
    except InputError:
        return
    there = written.get("method") if isinstance(written, dict) else None
    if there not in (None, resolved.recipe.method):
        raise UsageError(
            f"{run.root}: holds a run of method {there}, and this command names none, which means "
            f"{resolved.recipe.method}; add --method {there} to resume it, or --preset "
            f"{DEFAULT_PRESET} to start anew here"
        )


def _model(recipe: Recipe) -> tuple[Place, str]:
    """Place of the model, and its name in the result."""
    found = locate(recipe.model, revision=recipe.revision, download=recipe.download)
    is_hub_id = isinstance(found, Path) and not Path(recipe.model).expanduser().is_dir()
    model: Place = found.absolute()
    return model, recipe.model if is_hub_id else model.name
