"""Measurement of the rates of one worker on this machine, for forecasts."""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.errors import UsageError
from orchestrator.linalg.speeds import eigen_rate, product_rate
from orchestrator.linalg.tensor_cores import tensor_cores
from orchestrator.models.checkpoint.weights import parse_dtype
from orchestrator.readable import counted

SIZES = {"cpu": (1024, 768), "cuda": (8192, 8192)}
"""Sizes of the measured matrix products and eigendecompositions, by device. The rate of an
eigendecomposition grows with its size; on a GPU it is the largest of a 70B model."""
FILE_BYTES = 2**28
IMPORTS = "import torch, transformers, orchestrator.models.shards.lazy_model"
"""Imports of a worker process at its start."""


def measure_machine(directory: Path, dtype: str, threads: int) -> dict[str, Any]:
    """Measure the rates of this process in FLOPs and bytes per second; records the settings.

    Raises:
        UsageError: The dtype or the number of threads is invalid.
    """
    half = parse_dtype(dtype)
    if half is None or threads < 1:
        raise UsageError(f"dtype is {dtype!r}, threads {threads}; give for example bfloat16 and 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        products, eigen = SIZES[device.type]
        found = {
            "half": product_rate(half, device, products),
            "tf32": _product_rate_cast_from(half, device, products),
            "single": product_rate(torch.float32, device, products),
            "double": product_rate(torch.float64, device, products),
            "eigen": eigen_rate(device, eigen),
        }
    finally:
        torch.set_num_threads(before)
    is_gpu = device.type == "cuda"
    processor = f"{platform.machine()}, {counted(threads, 'thread')}"
    name = torch.cuda.get_device_name() if is_gpu else processor
    memory = torch.cuda.get_device_properties(0).total_memory if is_gpu else host_bytes()
    written, read = _storage_rates(directory)
    return {
        "name": name,
        "device": device.type,
        "memory_bytes": memory,
        **found,
        "write": written,
        "read": read,
        "network": _copy_rate(),
        "start": _start_seconds(),
        "dtype": dtype,
        "sizes": {"products": products, "eigen": eigen},
    }


def _product_rate_cast_from(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Rate of float32 products whose operands were cast from `dtype`."""
    with tensor_cores(dtype):
        return product_rate(torch.float32, device, size)


def host_bytes() -> int:
    """Memory available to this process: the machine's, or its control group's limit if lower."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            available = min(available, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return available


def _storage_rates(directory: Path) -> tuple[float, float]:
    """Rates of writing a file to disk and of reading it without the page cache, bytes/s."""
    content = np.random.default_rng(0).bytes(FILE_BYTES)
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(2**24):
            pass
        return FILE_BYTES / written, FILE_BYTES / (time.perf_counter() - start)


def _copy_rate() -> float:
    """Rate of a copy in memory, as between workers of this machine, bytes/s."""
    source = np.ones(FILE_BYTES, np.uint8)
    target, times = np.zeros_like(source), []
    for _ in range(3):
        start = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - start)
    return FILE_BYTES / statistics.median(times)


def _start_seconds() -> float:
    """Seconds until a new process has completed a worker's imports."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - start
