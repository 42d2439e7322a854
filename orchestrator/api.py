"""Python API: the commands of the command line as blocking functions with an event callback.

    from orchestrator import Recipe, compress, load

    result = compress(Recipe(model="dense/", out="small/", keep=0.8, calibration="text.txt"))
    model = load(result.out)

Heavy packages are imported when a function is called.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation import EvaluationRequest
from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import Recipe
from orchestrator.store.places import Place

if TYPE_CHECKING:
    from orchestrator.forecast.outcome import Forecast
    from orchestrator.searching import Search
    from orchestrator.store.cleaning import Cleaning

OnEvent = Callable[[dict[str, Any]], None]
"""Callback for the events of a run, see `orchestrator.events`."""


def compress(recipe: Recipe, on_event: OnEvent | None = None) -> Result:
    """Run a recipe, or resume it; blocks until the result is written.

    Uses the Ray to which this process is connected, if any, so it may be called in a Ray job;
    otherwise `recipe.address` is used.

    Raises:
        OrchestratorError: A subclass; `exit_code` tells which.
    """
    from orchestrator.stages import driver

    return driver.compress(recipe, on_event)


def compress_sizes(
    recipe: Recipe, keeps: Sequence[float], on_event: OnEvent | None = None
) -> list[Result]:
    """Compress to several sizes with one calibration, each to `OUT-KEEP`.

    Each result is byte-identical to a separate run. All share one run directory, by default
    `OUT.run`, so results that do not depend on the size are computed once.

    Args:
        recipe: Its own `keep` or `keep_bytes` is not used.
        keeps: Fractions of values, or of bytes if the recipe has `keep_bytes`, each above 0 and at
            most 1.

    Raises:
        UsageError: Two sizes are equal.
        OrchestratorError: As `compress`.
    """
    from orchestrator.errors import UsageError

    if len(set(keeps)) < len(keeps):
        raise UsageError(f"keep: {', '.join(map(str, keeps))} contains a size twice")
    run_dir = recipe.run_dir or f"{recipe.out}.run"
    recipes = [recipe.resized(k, out=f"{recipe.out}-{k:g}", run_dir=run_dir) for k in keeps]
    return [compress(each, on_event) for each in recipes]


def retarget(
    run_dir: str | Path, out: str | Path, *, on_event: OnEvent | None = None, **given: Any
) -> Result:
    """Make another size from the stored results of a run, without text, calibration or SVD.

    The result is byte-identical to that of a separate run.

    Args:
        given: `keep` or `keep_bytes`, and any other field of the recipe to change; results that
            depend on it are computed again.

    Raises:
        InputError: The directory has no run, or the run stopped before it read its text.
        OrchestratorError: As `compress`.
    """
    from orchestrator.stages import driver
    from orchestrator.stages.context.previous_run import asked_before

    recipe, before = asked_before(str(run_dir), str(out), **given)
    return driver.compress(recipe, on_event, before)


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
        recipe: Its model is a directory, a cached hub id, or a config.json (`shapes.FAMILIES`).
        gpus: Number of workers, one per GPU; a number in `recipe.workers` takes precedence.
        gpu: A name of `orchestrator.forecast.rates.known_devices`.
        gpu_memory: Such as "80GB"; None means that of the device.
        host_memory: Host memory of a worker; None means unchecked.
        price: Price of a worker per hour.
        rates: File written by `measure`, instead of the named GPU.

    Raises:
        UsageError: A name or a number is not allowed.
        InputError: A run would refuse the model, or its family requires the headers.
    """
    from orchestrator.errors import UsageError
    from orchestrator.forecast.forecast import forecast
    from orchestrator.forecast.outcome import Resources
    from orchestrator.forecast.rates import machine_of, read_machine
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
    from orchestrator.models.evaluation.machine import measure_machine
    from orchestrator.store.files import write_json

    write_json(Path(output), measure_machine(Path(output).absolute().parent, dtype, threads))
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

    verbs: dict[str, Any] = {"compress": compress, "evaluate": evaluate}
    return searching.search(recipe, vary, text=text, **verbs, on_event=on_event, **evaluation)


def evaluate(
    model: str | Path, *, on_event: OnEvent | None = None, **request: Any
) -> dict[str, Any]:
    """Measure perplexity, speed and size of a model, and its distance to another one.

    Runs through the shards like a calibration, with the same blocks of both models side by side: a
    process never holds a whole model unless there is only one shard.

    Args:
        request: The fields of `orchestrator.evaluation.EvaluationRequest`.

    Returns:
        `models` (for `model` and `against`: perplexity = exp of the mean over sequences of the
        mean loss, parameters, bytes, tokens per second in prefill and in decoding), `kl`,
        `top1_agreement`, `predictions`, `text`, and the environment; `against_is_base` is False if
        `against` is not the model that `model` was compressed from.

    Raises:
        UsageError: A field has a type or value that is not allowed.
        OrchestratorError: Another subclass; `exit_code` tells which.
    """
    from orchestrator.models.checkpoint.weights import parse_dtype
    from orchestrator.stages import driver
    from orchestrator.stages.evaluate.values import ask_evaluation
    from orchestrator.store.places import parse_place

    asked = EvaluationRequest(model=str(model), **request)
    # a hub id has no directory: use the working directory
    beside = Path(model).absolute() if Path(model).is_dir() else parse_place(model).name
    evaluation = ask_evaluation(
        asked.models(),
        text=asked.text_facts(),
        dtype=parse_dtype(asked.dtype),
        execution=asked,
        run_dir=parse_place(asked.run_dir or f"{beside}.evaluation"),
    )
    return driver.evaluate(evaluation, on_event)


def export(out: str | Path, dense_dir: str | Path, format: str = "dense") -> Path:
    """Convert a compressed checkpoint to dense weights, for programs without support for factors.

    Raises:
        UsageError: The format is unknown, or `dense_dir` contains other files.
        InputError: `out` is not a compressed checkpoint, or is damaged.
    """
    from orchestrator.errors import UsageError
    from orchestrator.hf.export import export_dense

    if format != "dense":
        raise UsageError(f"format is {format!r}; it must be dense")
    export_dense(Path(out), Path(dense_dir))
    return Path(dense_dir)


def verify(
    out: str | Path, *, against: str | Path | None = None, linears: int = 14
) -> dict[str, Any]:
    """Check a compressed checkpoint: hashes, shapes, ranks, values, reconstructions, logits.

    See `orchestrator.models.evaluation.verification`.

    Args:
        against: Directory of the dense model, with which errors and logits are compared.
        linears: Number of linears to reconstruct.

    Returns:
        The findings; `problems` is empty for a valid checkpoint.
    """
    from orchestrator.errors import UsageError
    from orchestrator.models.evaluation.verification import verify as perform
    from orchestrator.stages import STAGES

    if linears < 0:
        raise UsageError(f"linears is {linears}; it must be 0 or above")
    changing = [stage.name for stage in STAGES.values() if stage.changes_errors]
    dense = None if against is None else Path(against)
    return perform(Path(out), changing=changing, dense=dense, linears=linears)


def load(out: str | Path, **options: Any) -> Any:
    """Load a compressed (or dense) checkpoint as a transformers model.

    Args:
        options: Arguments of `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, ...
    """
    from orchestrator import hf

    return hf.load(out, **options)


def status(run_dir: str | Path) -> dict[str, Any]:
    """Return the status of a run, from its directory alone.

    Raises:
        InputError: The directory has no run.
    """
    from orchestrator.store.places import parse_place
    from orchestrator.store.run import RunDirectory

    return RunDirectory(parse_place(run_dir)).status()


def report(run_dir: str | Path, output: str | Path | None = None) -> "Place":
    """Write one HTML page about a run: recipe, result and losses.

    The page is self-contained. Of an unfinished run it shows the results so far. It includes
    evaluations beside the checkpoint (`OUT.evaluation`, or any run directory that names it).

    Args:
        run_dir: A run directory, or a compressed checkpoint; for a run directory with several
            results, the page is about the last one.
        output: The file; None means `report.html` in the run directory, or `OUT.report.html` beside
            a checkpoint.

    Raises:
        InputError: The place is neither a run nor a checkpoint, or one of its files is damaged.
    """
    from orchestrator.pages import write_report
    from orchestrator.store.places import parse_place

    return write_report(parse_place(run_dir), None if output is None else parse_place(output))


def compare(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> "Place":
    """Write one HTML page that compares runs.

    Args:
        run_dirs: Two or more, as for `report`.
        output: The file; None means `comparison.html` in the working directory.

    Raises:
        InputError: A place is neither a run nor a checkpoint, or one of its files is damaged.
        UsageError: Fewer than two runs are given.
    """
    from orchestrator.pages import write_comparison
    from orchestrator.store.places import parse_place

    runs = [parse_place(run_dir) for run_dir in run_dirs]
    return write_comparison(runs, None if output is None else parse_place(output))


def submit(
    program: Sequence[str],
    *,
    address: str | None = None,
    retries: int = 3,
    working_dir: str | Path = ".",
    exclude: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    wait: bool = True,
    show: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Run a command line as a Ray job, with retries; returns its exit code.

    A retry, under another submission id, resumes the run. It follows if the driver was killed, its
    node or the head was lost, or the run was stopped or lost its workers, but not if the program
    ended with 2, 3 or 4. SIGINT and SIGTERM stop the job.

    Args:
        program: Arguments of `orchestrator`: `["compress", "/shared/dense", ...]`.
        address: The dashboard, http://HEAD:8265; None means the one that Ray finds.
        retries: Attempts after the first, each after a pause of 5 to 60 s.
        working_dir: Directory that is uploaded with the job and in which its program starts.
        exclude: Files not to upload, in the syntax of `.gitignore`, besides `.venv`, `.work`,
            `.git` and those in its `.gitignore`.
        env: Environment variables of the job. Secrets (the token of the cluster, keys of stores and
            hubs) are refused, because the job displays its variables.
        wait: If False, the job is only submitted, and 0 is returned.
        show, say: Receive the log of the job in pieces, and lines about it; None means stdout.

    Raises:
        UsageError: An argument is wrong, or the address denies access or does not respond.
        StoppedError: A signal was received, or the head did not respond for ten minutes.
    """
    from orchestrator.errors import UsageError
    from orchestrator.runtime.ray import submit as jobs
    from orchestrator.runtime.ray.submit_policy import SECRET

    if retries < 0:
        raise UsageError(f"retries is {retries}; it must be 0 or above")
    if not Path(working_dir).is_dir():
        raise UsageError(f"working_dir: {working_dir} is not a directory")
    for name in env or {}:
        if name.startswith("RAY_AUTH_TOKEN"):
            raise UsageError(f"env: {name} would be displayed with the job; the cluster has it")
        if SECRET.search(name):
            raise UsageError(f"env: {name} would be displayed with the job; set it on the nodes")
    return jobs.submit(
        program,
        address=address,
        retries=retries,
        working_dir=str(working_dir),
        exclude=exclude,
        env=env or {},
        wait=wait,
        show=show or partial(print, end="", flush=True),
        say=say or print,
    )


def clean(run_dir: str | Path, *, dry_run: bool = False) -> "Cleaning":
    """Remove the files of a run from its directory, and the directory once it is empty.

    Args:
        dry_run: Only list; no file is removed.

    Returns:
        The removed files and directories, and those that are left because others wrote them.

    Raises:
        InputError: The directory has no run.
        UsageError: A driver is using it.
    """
    from orchestrator.store.places import parse_place
    from orchestrator.store.run import RunDirectory

    return RunDirectory(parse_place(run_dir)).remove(dry_run=dry_run)
