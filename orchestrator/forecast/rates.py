"""Rates of machines: named GPUs from `rates.json`, or this machine as measured."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.headers import read_json

ROWS = ("data_sheet", "pessimistic")
MEASURED = "measured"
MEMORY_TRAFFIC = "memory_traffic"
"""A third row, of eigendecompositions alone."""
SLACK = 1.45
"""Time of an eigendecomposition over that of its traffic and its products, by the one published
time of cuSOLVER (`rates.json`)."""
PRODUCT_SHARE = 0.7
"""Fraction of the FP64 rate that the products of an eigendecomposition reach."""
_SPEEDS = ("half", "tf32", "single", "double", "eigen", "read", "write", "network", "start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of one worker, its storage and network, in FLOPs or bytes a second."""

    row: str
    """`data_sheet`, `pessimistic` or `measured`."""
    half: float
    """Matrix products of 16-bit values, and passes in them."""
    tf32: float
    """Products of 16-bit values in float32: most Grams (`linalg.tensor_cores`)."""
    single: float
    """Products of float32: passes and Grams in float32, and training."""
    double: float
    """Products of float64."""
    eigen: float
    """Symmetric eigendecompositions in float64, counted as 9 n^3."""
    read: float
    write: float
    network: float
    start: float
    """Seconds until workers are ready."""
    source: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware of a worker."""

    name: str
    memory_bytes: float | None
    """Memory of the device; None if the machine was measured without one."""
    rows: tuple[Rates, ...]
    is_gpu: bool = False
    """True if a worker has a GPU, whose memory is then the limit."""
    modelled_eigen: float | None = None
    """The rate of eigendecompositions by memory traffic; None where it is measured."""
    model_source: str = ""


def known_devices() -> tuple[str, ...]:
    return tuple(_file()["devices"])


def machine_of(name: str) -> Machine:
    """A named GPU, with the rates of its data sheet and a pessimistic row.

    Raises:
        UsageError: There is no such name.
    """
    content = _file()
    if name not in content["devices"]:
        raise UsageError(f"gpu is {name!r}; it must be one of {', '.join(content['devices'])}")
    device, around = content["devices"][name], content["surroundings"]
    source = f"{device['source']} {around['source']}"
    rows = tuple(Rates(row=row, source=source, **device[row], **around[row]) for row in ROWS)
    size = 8192
    modelled = 9.0 * size**3 / eigen_seconds(size, device["bandwidth"], rows[0].double)
    return Machine(
        name,
        float(device["memory_bytes"]),
        rows,
        is_gpu=True,
        modelled_eigen=modelled,
        model_source=content[MEMORY_TRAFFIC]["source"],
    )


def nominal_rates(kind: str | None) -> Rates:
    """Rates by which the stages of a run are compared with each other: those of a GPU, or a CPU's.

    Args:
        kind: Name of the GPU as the driver or Ray has it; None, or unknown: a CPU.
    """
    content, row = _file(), "nominal"
    for name, device in content["devices"].items():
        if kind is not None and name.partition("-")[0] in kind:
            around = content["surroundings"]["pessimistic"]
            return Rates(row=row, source="", **device["pessimistic"], **around)
    return Rates(row=row, **content["processor"])


def eigen_seconds(size: int, bandwidth: float, products: float, itemsize: int = 8) -> float:
    """Time of a symmetric eigendecomposition with vectors on a GPU, by its memory traffic.

    With n rows of b bytes an entry, B bytes a second of memory and F FLOP/s of products,

        t = 1.45 (b n^3 / 6 / B + 14/3 n^3 / (0.7 F))

    Each of the n steps of the tridiagonalization multiplies a vector with the rest of the matrix,
    half of which is read from memory: the sum over n is n^3 / 6 entries. Updates, divide and
    conquer and the back-transformation are products. Both terms grow as n^3, so the rate, 9 n^3 / t
    as `Rates.eigen` counts, is the same for every n; matrices that fit into a cache are faster, and
    small ones are bound by the time that kernels take to start. Over 90 % of the time on an H100 is
    the tridiagonalization (arXiv:2410.02170).

    Args:
        size: n.
        bandwidth: B.
        products: F, in the matrix's dtype.
        itemsize: b.
    """
    traffic = itemsize * size**3 / 6 / bandwidth
    computed = 14 / 3 * size**3 / (PRODUCT_SHARE * products)
    return SLACK * (traffic + computed)


def largest_memory(kind: str) -> float | None:
    """Largest memory of the GPUs of a type, as Ray names it (`A100`); None if it is unknown."""
    devices = _file()["devices"].items()
    known = [d["memory_bytes"] for name, d in devices if kind in (name, name.partition("-")[0])]
    return max(known, default=None)


def read_machine(path: Path) -> Machine:
    """Read a file of `orchestrator measure`.

    Raises:
        UsageError: It is something else.
        InputError: The file cannot be read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; `orchestrator measure` writes it")
    content = read_json(path)
    speeds = {name: content.get(name) for name in _SPEEDS}
    for name, value in speeds.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
            raise UsageError(f"{path}: {name} is {value!r:.60}; `orchestrator measure` writes it")
    memory = content.get("memory_bytes")
    known = memory if type(memory) in (int, float) else None
    row = Rates(row=MEASURED, source=f"measured, {path}", **speeds)  # type: ignore[arg-type]
    is_gpu = content.get("device") == "cuda"
    return Machine(str(content.get("name", path)), known, (row,), is_gpu)


def _file() -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(Path(__file__).with_name("rates.json").read_text())
    return content
