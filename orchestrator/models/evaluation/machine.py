"""What one worker of this machine can do: the rates that a forecast computes with."""

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

SIZES = {"cpu": (1024, 768), "cuda": (8192, 8192)}
"""Sizes of products and of eigendecompositions; rates of the latter grow with the size, so on a GPU
it is the largest one in a 70B model."""
FILE_BYTES = 2**28
IMPORTS = "import torch, transformers, orchestrator.models.shards.lazy_model"
"""What a worker's process does before it is of use."""


def measure_machine(directory: Path, dtype: str, threads: int) -> dict[str, Any]:
    """The rates of this process, FLOPs and bytes a second, and how it was measured.

    Raises:
        UsageError: The dtype or the number of threads is not allowed.
    """
    half = parse_dtype(dtype)
    if half is None or threads < 1:
        raise UsageError(f"dtype is {dtype!r}, threads {threads}; give bfloat16 and 1, for example")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        products, eigen = SIZES[device.type]
        found = {
            "half": product_rate(half, device, products),
            "tf32": _product_rate_of(half, device, products),
            "single": product_rate(torch.float32, device, products),
            "double": product_rate(torch.float64, device, products),
            "eigen": eigen_rate(device, eigen),
        }
    finally:
        torch.set_num_threads(before)
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if is_gpu else f"{platform.machine()}, {threads} threads"
    memory = torch.cuda.get_device_properties(0).total_memory if is_gpu else host_bytes()
    written, read = _storage(directory)
    return {
        "name": name,
        "device": device.type,
        "memory_bytes": memory,
        **found,
        "write": written,
        "read": read,
        "network": _copying(),
        "start": _starting(),
        "dtype": dtype,
        "sizes": {"products": products, "eigen": eigen},
    }


def _product_rate_of(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Of float32 products whose sides were cast from a dtype."""
    with tensor_cores(dtype):
        return product_rate(torch.float32, device, size)


def host_bytes() -> int:
    """Memory that this process may have: the machine's, or its control group's if that is less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            there = min(there, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return there


def _storage(directory: Path) -> tuple[float, float]:
    """Bytes a second to a file on disk, and from it once the system has forgotten it."""
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


def _copying() -> float:
    """Bytes a second from one place in memory to another, as chunks go between workers here."""
    source = np.ones(FILE_BYTES, np.uint8)
    target, times = np.zeros_like(source), []
    for _ in range(3):
        start = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - start)
    return FILE_BYTES / statistics.median(times)


def _starting() -> float:
    """Seconds until a process has imported what a worker needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return time.perf_counter() - start
