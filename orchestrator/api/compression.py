"""Compression, its forecast, and the search over settings."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.checkpoints import evaluate
from orchestrator.events import OnEvent, announce_imports
from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import SIZE_FIELDS, Recipe
from orchestrator.store.places import Place

if TYPE_CHECKING:
    from orchestrator.forecast.outcome import Forecast
    from orchestrator.searching import Search


def compress(recipe: Recipe, on_event: OnEvent | None = None) -> Result:
    """Run a recipe, or resume it; blocks until the result is written.

    Uses the Ray to which this process is connected, if any, so it may be called in a Ray job;
    otherwise `recipe.address` is used.

    Raises:
        OrchestratorError: A subclass; `exit_code` tells which.
    """
    from orchestrator.api.checks import check_recipe

    # before torch is imported, which takes seconds
    check_recipe(recipe)
    announce_imports(on_event)
    from orchestrator.stages import driver

    return driver.compress(recipe, on_event)


def compress_sizes(
    recipe: Recipe, keeps: Sequence[float], on_event: OnEvent | None = None
) -> list[Result]:
    """Compress to several sizes with one calibration, each to `OUT-KEEP`.

    Each result is byte-identical to a separate run. All share one run directory, by default
    `OUT.run`, so results that do not depend on the size are computed once.

    Args:
        recipe: Its own size is not used.
        keeps: Fractions of the quantity that its size is of, values for `keep`; each above 0 and
            at most 1.

    Raises:
        UsageError: Two sizes are equal.
        OrchestratorError: As `compress`.
    """
    _check_distinct(keeps)
    run_dir = recipe.run_dir or f"{recipe.out}.run"
    recipes = [recipe.resized(k, out=f"{recipe.out}-{k:g}", run_dir=run_dir) for k in keeps]
    return [compress(each, on_event) for each in recipes]


def retarget(
    run_dir: str | Path, out: str | Path, *, on_event: OnEvent | None = None, **given: Any
) -> Result:
    """Make another size from the stored results of a run, without text, calibration or SVD.

    The result is byte-identical to that of a separate run.

    Args:
        given: A size, such as `keep` or `keep_flops`, and any other field of the recipe to change;
            results that depend on it are computed again. `options` change those that they name.

    Raises:
        InputError: The directory has no run, or the run stopped before it read its text.
        OrchestratorError: As `compress`.
    """
    from orchestrator.resolve import resolve
    from orchestrator.stages.context.previous_run import asked_before
    from orchestrator.stages.context.run_places import places_of

    # before torch is imported, which takes seconds
    recipe, before = asked_before(str(run_dir), str(out), **given)
    resolve(recipe, inherited=before.inherited)
    places_of(recipe, before.model)
    announce_imports(on_event)
    from orchestrator.stages import driver

    return driver.compress(recipe, on_event, before)


def retarget_sizes(
    run_dir: str | Path,
    out: str | Path,
    keeps: Sequence[float],
    *,
    on_event: OnEvent | None = None,
    **given: Any,
) -> list[Result]:
    """Make several sizes from the stored results of a run, each in `OUT-KEEP`.

    Args:
        keeps: Fractions of the quantity of the size that `given` has, which is not used itself;
            otherwise of values.
        given: As for `retarget`.

    Raises:
        UsageError: Two sizes are equal.
        OrchestratorError: As `retarget`.
    """
    from orchestrator.resolve import resolve
    from orchestrator.stages.context.previous_run import asked_before
    from orchestrator.stages.context.run_places import places_of

    # before torch is imported, which takes seconds
    _check_distinct(keeps)
    unit = next((name for name in SIZE_FIELDS if name in given), "keep")
    asked = [asked_before(str(run_dir), f"{out}-{k:g}", **{**given, unit: k}) for k in keeps]
    for recipe, before in asked:
        resolve(recipe, inherited=before.inherited)
        places_of(recipe, before.model)
    announce_imports(on_event)
    from orchestrator.stages import driver

    return [driver.compress(recipe, on_event, before) for recipe, before in asked]


def _check_distinct(keeps: Sequence[float]) -> None:
    """Raise UsageError if a size is given twice, since its results would have the same name."""
    from orchestrator.errors import UsageError

    if len({f"{keep:g}" for keep in keeps}) < len(keeps):
        raise UsageError(f"keep: {', '.join(map(str, keeps))} contains a size twice")


def plan(
    recipe: Recipe,
    *,
    gpus: int = 1,
    gpu: str = "H100",
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    price: float | None = None,
    rates: str | Path | None = None,
) -> "Forecast":
    """Forecast memory, time and cost of a recipe, from config and headers alone.

    Args:
        recipe: Its model is a directory, a cached hub id, or a config.json.
        gpus: Number of workers, one per GPU; a number in `recipe.workers` takes precedence.
        gpu: A name of `orchestrator.forecast.rates.known_devices`.
        gpu_memory: Such as "80GB"; None means that of the device.
        host_memory: Host memory of a worker; None means unchecked.
        price: Price of a worker per hour.
        rates: File written by `measure`, instead of the named GPU.

    Raises:
        UsageError: A name or a number is not allowed.
        InputError: A run would refuse the model or the text. A text beside a config alone is not
            looked up.
    """
    from orchestrator.api.checks import check_text
    from orchestrator.errors import UsageError
    from orchestrator.forecast.forecast import forecast
    from orchestrator.forecast.outcome import Resources
    from orchestrator.forecast.rates import machine_of, read_machine
    from orchestrator.models.checkpoint.headers import has_weights
    from orchestrator.recipe.values import size_in_bytes
    from orchestrator.stages.plannable import plannable_shapes

    if gpus < 1:
        raise UsageError(f"gpus is {gpus}; it must be 1 or above")
    if price is not None and not 0 <= price < float("inf"):
        raise UsageError(f"price is {price}; it must be 0 or above")
    model: Place = Path(recipe.model).expanduser()
    if not model.exists():
        from orchestrator.models.survey.locate import locate

        model = locate(recipe.model, revision=recipe.revision)
    resources = Resources(
        workers=recipe.workers if isinstance(recipe.workers, int) else gpus,
        machine=machine_of(gpu) if rates is None else read_machine(Path(rates)),
        memory_bytes=None if gpu_memory is None else size_in_bytes(gpu_memory),
        host_bytes=None if host_memory is None else size_in_bytes(host_memory),
        price=price,
    )
    if recipe.calibration is not None and model.is_dir() and has_weights(model):
        check_text(recipe.calibration)
    return forecast(plannable_shapes(model), recipe, resources)


def measure(output: str | Path, *, dtype: str = "bfloat16", threads: int = 1) -> Path:
    """Measure this machine, as seen by one worker, for `plan`; takes seconds, more on a CPU.

    Measures the rates of products and eigendecompositions, of reading and writing in the directory
    of the file and of copying in memory, the start time of a worker process, and the available
    memory.

    Args:
        output: The JSON file.
        dtype: Dtype of the forward passes.
        threads: Threads of a worker; no effect on a GPU.
    """
    from orchestrator.errors import UsageError

    directory = Path(output).absolute().parent
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; create it, or name another file")
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UsageError(
            f"{directory}: cannot be written to; name a file in another directory"
        ) from error
    from orchestrator.models.evaluation.machine import measure_machine
    from orchestrator.store.files import write_json

    write_json(Path(output), measure_machine(directory, dtype, threads))
    return Path(output)


def search(
    recipe: Recipe,
    vary: Mapping[str, Sequence[Any]],
    *,
    text: str,
    on_event: OnEvent | None = None,
    **evaluation: Any,
) -> "Search":
    """Compress with every combination of settings, and keep the best on held-out text.

    See `orchestrator.searching`: `vary` has the values to try by field (`storage`) or option
    (`mgaa.t`); `evaluation` are arguments of `evaluate`.
    """
    from orchestrator import searching
    from orchestrator.models.inputs.sources import named_source

    named_source(recipe.calibration)
    verbs: dict[str, Any] = {"compress": compress, "evaluate": evaluate}
    return searching.search(recipe, vary, text=text, **verbs, on_event=on_event, **evaluation)
