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
