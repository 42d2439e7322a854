"""Check of the machine, and speed of models on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.doctor import Finding


def doctor(*, address: str | None = None) -> "list[Finding]":
    """Check versions, devices, Ray, disks and memory of this machine; starts no process.

    Takes the time in which torch, transformers and Ray are imported.

    Args:
        address: host:port of the head of a Ray cluster to look for; None means `RAY_ADDRESS`, or
            the cluster that was started on this machine.

    Returns:
        One finding per item: ok, warning or missing, with a remedy. `fails` is true for a missing
        item without which no model can be compressed.
    """
    from orchestrator.doctor import examine

    return examine(address)


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    batch: Sequence[int] = (1, 8, 64),
    length: Sequence[int] = (128,),
    dtype: str = "auto",
    threads: int = 1,
) -> dict[str, Any]:
    """Measure prefill and decoding of a model and of its linears, on a GPU if there is one.

    Models are whole in the memory of this process, and measured in turn. The result is also written
    to `MODEL.bench.json` beside the model, where its report page finds it.

    Args:
        model: Directory, compressed or dense.
        against: Directory of the dense model.
        batch: Numbers of sequences.
        length: Tokens of each sequence in prefill, and before the token that is decoded.
        dtype: Dtype of both models; `auto` is that of each checkpoint.
        threads: Threads of a CPU; with one, processor time is measured.

    Returns:
        `whole`: for each phase, number and length, seconds and tokens a second of each model, the
        least seconds that the machine's rates allow for their linears, the `speed` over dense and
        `why` it is below 1; `linears`: the same for the typical linear of each role and shape;
        `limits`: the measured rates; the device, and `file`.

    Raises:
        UsageError: A number or the dtype is not allowed.
        InputError: A model cannot be loaded, or does not fit.
    """
    from orchestrator.bench.benchmark import benchmark
    from orchestrator.plan.result import BENCH_SUFFIX
    from orchestrator.store.files import write_json

    models = {"model": Path(model).expanduser().absolute()}
    if against is not None:
        models["against"] = Path(against).expanduser().absolute()
    found = benchmark(models, batches=batch, lengths=length, dtype=dtype, threads=threads)
    file = models["model"].with_name(f"{models['model'].name}{BENCH_SUFFIX}")
    write_json(file, found)
    return {**found, "file": str(file)}


def measure_latency(
    model: str | Path, file: str | Path, *, tokens: int = 1, dtype: str = "auto", threads: int = 1
) -> dict[str, Any]:
    """Measure the linears of a dense model on this machine, for `Recipe.latency_table`.

    Each shape once, dense and at up to twelve multiples as plain and as pivoted factors, with
    weights that come from memory. Only config and headers of the model are read.

    Args:
        model: Directory of the dense model.
        file: JSON file of the table.
        tokens: Tokens of each product: 1 for decoding one sequence, as many as pass together in
            prefill or in a batch otherwise.
        dtype: Dtype of the products; `auto` is that of the checkpoint.
        threads: Threads of a CPU; with one, processor time is measured.

    Returns:
        The content of the file: device, dtype, threads and tokens, and for each shape its number,
        `dense_seconds`, and for each form pairs of rank and seconds.

    Raises:
        UsageError: A number or the dtype is not allowed, or the directory of the file is missing.
        InputError: The model cannot be read or is compressed, or the memory is too small.
    """
    from orchestrator.bench.latency import measure_latency as measured
    from orchestrator.errors import InputError, UsageError
    from orchestrator.models.checkpoint.weights import parse_dtype
    from orchestrator.models.shards.lazy_model import LazyModel
    from orchestrator.store.files import write_json

    path = Path(file).expanduser().absolute()
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such directory; create it, or name another file")
    opened = LazyModel.open(Path(model).expanduser().absolute())
    if opened.is_compressed:
        raise InputError(f"{model}: is compressed; give the dense model, whose shapes count")
    found = opened.survey()
    asked = parse_dtype(found.dtype if dtype == "auto" else dtype)
    assert asked is not None
    table = measured(found.linears, tokens=tokens, dtype=asked, threads=threads)
    write_json(path, {"model": str(model), **table})
    return {**table, "file": str(path)}
