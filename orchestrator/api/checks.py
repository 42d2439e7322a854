"""Checks of arguments that need no torch, whose import takes seconds: they are made before it.

What they find is what the command itself would say later.
"""

from pathlib import Path

from orchestrator.recipe.recipe import Recipe
from orchestrator.store.places import Place, parse_place


def check_recipe(recipe: Recipe) -> None:
    """Check the names and options of a recipe, and the places that it names.

    Raises:
        UsageError: A name, an option or the kind of the text is not allowed, no text is named, or
            one directory lies in another.
        InputError: The model or the text does not exist.
    """
    from orchestrator.models.inputs.sources import named_source
    from orchestrator.resolve import resolve
    from orchestrator.stages.context.run_places import places_of

    calibration = named_source(recipe.calibration)
    resolve(recipe)
    model = check_model(recipe.model, recipe.revision, download=recipe.download)
    places_of(recipe, None if model is None else model.absolute())
    check_text(calibration)


def check_model(model: str, revision: str | None = None, *, download: bool = False) -> Place | None:
    """Place of a model, or None before its download; stores are not asked yet.

    Raises:
        InputError: The model is on no disk.
        UsageError: The store is of no known kind, or a revision is given for a directory.
    """
    from orchestrator.models.survey.locate import locate

    if "://" in model:
        return parse_place(model)
    if download:
        return None
    return locate(model, revision=revision)


def check_text(written: str) -> None:
    """Check the sources of a text, or of a mixture, that are on disk.

    Raises:
        UsageError: A source is of no known kind.
        InputError: A source does not exist.
    """
    from orchestrator.models.inputs.sources import (
        BUNDLED,
        DATASETS_PREFIX,
        check_place,
        parse_sources,
        place_of,
    )

    for source in parse_sources(written):
        if source.name == BUNDLED or source.name.startswith(DATASETS_PREFIX):
            continue
        place = place_of(source.name)
        if isinstance(place, Path):
            check_place(place, source.name)
