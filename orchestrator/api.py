"""The Python API: the same verbs as the command line, blocking, with an event callback.

    from orchestrator import Recipe, compress, load

    result = compress(Recipe(model="dense/", out="small/", keep=0.8, calibration="text.txt"))
    model = load(result.out)

Heavy packages are imported when a verb is called.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.plan.result import Result
from orchestrator.recipe.recipe import Recipe
from orchestrator.store.places import Place

if TYPE_CHECKING:
    from orchestrator.forecast.outcome import Forecast
    from orchestrator.searching import Search

SECRET = re.compile(r"SECRET|PASSWORD|(ACCESS|ACCOUNT|API)_KEY|SESSION_TOKEN|^(HF|.*_HUB)_TOKEN$")
"""Names of variables that a job is not to show."""
OnEvent = Callable[[dict[str, Any]], None]
"""Told of everything that happens: plain dicts with an `event` of `stage`, `unit`, `note`,
`workers`, `waiting`, `snapshot`, `lost`, `missing` or `damaged`."""


def compress(recipe: Recipe, on_event: OnEvent | None = None) -> Result:
    """Performs a recipe, or takes it up where it was left; blocks until the result is written.

    Uses the Ray that this process is connected to if there is one, so it may be called inside a
    script that is itself a Ray job; otherwise `recipe.address` decides.

    Raises:
        OrchestratorError: One of its kinds, by what is wrong; `exit_code` says which.
    """
    from orchestrator.stages import driver

    return driver.compress(recipe, on_event)


def compress_sizes(
    recipe: Recipe, keeps: Sequence[float], on_event: OnEvent | None = None
) -> list[Result]:
    """One calibration, many sizes: each in `OUT-KEEP`, byte for byte what it is when asked alone.

    All share the run directory, `OUT.run` without another one, so what does not depend on the size
    is computed once.

    Args:
        recipe: Its own size is not used.
        keeps: Fractions of values, or of bytes if the recipe has `keep_bytes`, each above 0 and at
            most 1.

    Raises:
        UsageError: Two sizes are the same.
        OrchestratorError: As `compress`.
    """
    from orchestrator.errors import UsageError

    if len(set(keeps)) < len(keeps):
        raise UsageError(f"keep: {', '.join(map(str, keeps))} names a size twice")
    name = "keep" if recipe.keep_bytes is None else "keep_bytes"
    shared = replace(recipe, run_dir=recipe.run_dir or f"{recipe.out}.run")
    sizes: list[dict[str, Any]] = [{name: keep, "out": f"{recipe.out}-{keep:g}"} for keep in keeps]
    recipes = [replace(shared, **size) for size in sizes]
    return [compress(each, on_event) for each in recipes]


def retarget(
    run_dir: str | Path,
    out: str | Path,
    *,
    on_event: OnEvent | None = None,
    **given: Any,
) -> Result:
    """Cuts another size from what a run has stored, without its text, calibration or SVD.

    The result is byte for byte what a run of its own would give.

    Args:
        given: `keep` or `keep_bytes`, and any other field of the recipe that is to change; what
            depends on it is computed again.

    Raises:
        InputError: There is no run here, or it came not so far as to read its text.
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
    """What a recipe will take, from config and headers alone: no torch, no machine, milliseconds.

    Args:
        recipe: Its model may be a directory, a hub id in the local cache, or a config.json of one
            of `orchestrator.forecast.shapes.FAMILIES`.
        gpus: Workers, one a GPU; `recipe.workers`, where it is a number, wins.
        gpu: A name of `orchestrator.forecast.rates.known_devices`.
        gpu_memory: "80GB"; the device's own without it.
        host_memory: Of a worker; not checked without it.
        price: Of a worker for an hour.
        rates: A file that `measure` has written, in place of the named GPU.

    Raises:
        UsageError: A name or a number is not allowed.
        InputError: The model cannot be read, or is of a family that needs its headers.
    """
    from orchestrator.errors import UsageError
    from orchestrator.forecast.forecast import forecast
    from orchestrator.forecast.outcome import Resources
    from orchestrator.forecast.rates import machine_of, read_machine
    from orchestrator.forecast.shapes import read_shapes
    from orchestrator.recipe.values import size_in_bytes

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
    return forecast(read_shapes(model), recipe, resources)


def measure(output: str | Path, *, dtype: str = "bfloat16", threads: int = 1) -> Path:
    """Measures this machine, as one worker has it, for `plan`; some seconds, more on a CPU.

    Written are the rates of products and eigendecompositions, of reading and writing beside the
    file, of copying in memory, how long a worker's process takes to start, and the memory there is.

    Args:
        output: The JSON file.
        dtype: Of forward passes.
        threads: Of a worker; a GPU does not mind.
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
    """Compresses with every combination of settings, keeps what held-out text likes best.

    See `orchestrator.searching`: `vary` has the values to try by field (`storage`) or option
    (`mgaa.t`); `evaluation` is as `evaluate` takes it.
    """
    from orchestrator import searching

    verbs: dict[str, Any] = {"compress": compress, "evaluate": evaluate}
    return searching.search(recipe, vary, text=text, **verbs, on_event=on_event, **evaluation)


def evaluate(
    model: str | Path,
    *,
    text: str,
    against: str | Path | None = None,
    field: str = "text",
    samples: int = 32,
    sequence_length: int = 2048,
    stride: int = 1,
    layout: str = "packed",
    dtype: str = "auto",
    executor: str = "ray",
    address: str | None = None,
    workers: int | str | None = None,
    threads: int | None = None,
    shards: int | None = None,
    run_dir: str | Path | None = None,
    allow_mixed: bool = False,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Perplexity, speed and size of a model, and how close it is to another on the same tokens.

    Runs through the shards like a calibration: the same blocks of both models side by side, never
    a whole model in one process unless there is one shard.

    Args:
        model: Directory or hub id of a dense or compressed checkpoint.
        text: Held-out text: .txt, .jsonl, .parquet, a directory of them, or `datasets:NAME`.
        against: The dense model; adds its own figures, the mean KL divergence from it in nats, and
            the fraction of tokens on which both put the same token first.
        samples, sequence_length, stride, layout: As for calibration; every `stride`-th window.
        dtype: Of the forward passes; `auto` is each checkpoint's own.
        run_dir: Where it is resumed from; nothing means `MODEL.evaluation`.
        allow_mixed: Whether scores of another device kind or version are added to.

    Returns:
        `models` (for `model` and `against`: perplexity = exp of the mean over sequences of the
        mean loss, parameters, bytes, tokens a second in prefill and in decoding), `kl`,
        `top1_agreement`, `predictions`, `text`, and what it ran on.

    Raises:
        OrchestratorError: One of its kinds, by what is wrong.
    """
    from orchestrator.models.checkpoint.weights import parse_dtype
    from orchestrator.runtime.workers import Execution
    from orchestrator.stages import driver
    from orchestrator.stages.evaluate.job import Evaluation
    from orchestrator.store.places import parse_place

    # a hub id has no place of its own: the working directory then
    beside = Path(model) if Path(model).is_dir() else parse_place(model).name
    models = {"model": str(model)} | ({} if against is None else {"against": str(against)})
    job = Evaluation(
        models,
        text={
            "source": text,
            "field": field,
            "samples": samples,
            "sequence_length": sequence_length,
            "stride": stride,
            "layout": layout,
        },
        dtype=parse_dtype(dtype),
        execution=Execution(
            executor=executor,
            address=address,
            workers=workers,
            threads=threads,
            shards=shards,
            allow_mixed=allow_mixed,
        ),
        run_dir=parse_place(run_dir or f"{beside}.evaluation"),
    )
    return driver.evaluate(job, on_event)


def export(out: str | Path, dense_dir: str | Path, format: str = "dense") -> Path:
    """Multiplies the factors of a compressed checkpoint back, for programs that know only dense.

    Raises:
        UsageError: The format is unknown, or `dense_dir` holds something else.
        InputError: `out` is no checkpoint of ours, or is damaged.
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
    """Reads a compressed checkpoint again: hashes, shapes, ranks, values, samples, logits.

    See `orchestrator.models.evaluation.verification`.

    Args:
        against: The dense model's directory; with it errors and logits are compared.
        linears: How many are reconstructed.

    Returns:
        What was found; `problems` is empty if all is well.
    """
    from orchestrator.errors import UsageError
    from orchestrator.models.evaluation.verification import verify as perform
    from orchestrator.stages import STAGES

    if linears < 0:
        raise UsageError(f"linears is {linears}; it must be 0 or above")
    changing = [stage.name for stage in STAGES if stage.changes_errors]
    dense = None if against is None else Path(against)
    return perform(Path(out), changing=changing, dense=dense, linears=linears)


def load(out: str | Path, **options: Any) -> Any:
    """The model in a compressed (or dense) checkpoint, ready to run, by plain transformers.

    Args:
        options: What `AutoModelForCausalLM.from_pretrained` takes: `dtype`, `device_map`, ...
    """
    from orchestrator import hf

    return hf.load(out, **options)


def status(run_dir: str | Path) -> dict[str, Any]:
    """Where a run stands, from its directory alone.

    Raises:
        InputError: There is no run here.
    """
    from orchestrator.store.places import parse_place
    from orchestrator.store.run import RunDirectory

    return RunDirectory(parse_place(run_dir)).status()


def report(run_dir: str | Path, output: str | Path | None = None) -> "Place":
    """Writes one HTML page that shows a run: what was asked, what it became, what it lost.

    The page loads nothing. A run that is not done is shown as far as it has come. Evaluations that
    lie beside the checkpoint (`OUT.evaluation`, or any run directory that names it) are shown too.

    Args:
        run_dir: A run directory, or a compressed checkpoint: a run directory from which several
            were cut speaks of the last one only.
        output: The file; nothing means `report.html` in the run directory, `OUT.report.html`
            beside a checkpoint.

    Raises:
        InputError: There is neither a run nor a checkpoint here, or a file of it is damaged.
    """
    from orchestrator.pages import write_report
    from orchestrator.store.places import parse_place

    return write_report(parse_place(run_dir), None if output is None else parse_place(output))


def compare(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> "Place":
    """Writes one HTML page that puts runs side by side.

    Args:
        run_dirs: Two or more, as `report` takes them.
        output: The file; nothing means `comparison.html` in the working directory.

    Raises:
        InputError: One of them is neither a run nor a checkpoint, or a file of it is damaged.
        UsageError: There are fewer than two.
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
    """Runs a command line as a Ray job, again while that may help; gives its exit code.

    Another attempt resumes the run. It is made, under another submission id, when the driver was
    killed, its node or the head went, or the run was stopped or lost its workers; not when the
    program said that what was asked is wrong (2, 3, 4). SIGINT and SIGTERM stop the job.

    Args:
        program: What follows `orchestrator`: `["compress", "/shared/dense", ...]`.
        address: The dashboard, http://HEAD:8265; without it what Ray finds.
        retries: Attempts after the first, each after a pause of 5 to 60 s.
        working_dir: Directory that travels with the job and that its program starts in.
        exclude: What of it stays behind, in the words of `.gitignore`; besides `.venv`, `.work`,
            `.git` and what its `.gitignore` names.
        env: Variables of the job. The cluster knows its token; here it is refused, as keys to
            stores and hubs are, because who sees the job sees its variables.
        wait: Otherwise the job is submitted and left alone; 0 is given.
        show: Takes the job's log in pieces; stdout without it.
        say: Takes lines about the job; stdout without it.

    Raises:
        UsageError: An argument is wrong, nothing answers at the address, it does not let us in,
            or it refuses the job.
        StoppedError: A signal came, or the head was silent for ten minutes.
    """
    from orchestrator.errors import UsageError
    from orchestrator.runtime.ray import submit as jobs

    if retries < 0:
        raise UsageError(f"retries: {retries} given; 0 or more are possible")
    if not Path(working_dir).is_dir():
        raise UsageError(f"working_dir: {working_dir} is no directory")
    for name in env or {}:
        if name.startswith("RAY_AUTH_TOKEN"):
            raise UsageError(f"env: {name} would be shown with the job; the cluster has its token")
        if SECRET.search(name):
            raise UsageError(f"env: {name} would be shown with the job; set it on the nodes")
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


def clean(run_dir: str | Path) -> None:
    """Removes a run directory; what it has written elsewhere stays.

    Raises:
        InputError: There is no run here.
        UsageError: A driver is at work on it.
    """
    from orchestrator.errors import UsageError
    from orchestrator.store.places import parse_place
    from orchestrator.store.run import RunDirectory

    run = RunDirectory(parse_place(run_dir))
    found = run.status()
    if found["state"] == "running":
        raise UsageError(
            f"{run_dir}: process {found.get('pid')} on {found.get('host')} is at work on it; "
            "stop it first"
        )
    run.remove()
