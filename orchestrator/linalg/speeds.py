"""Measured rates of the operations that a compression consists of.

Each rate is the median of a few repetitions after one warm-up, with the threads of this process.
"""

import statistics
import time
from collections.abc import Callable

import torch

from orchestrator.linalg.eigen import Eigensolver

REPEATS = 3


def product_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Measure FLOP/s of a product of two [size, size] matrices; a multiply-add counts as two."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=generator).to(device, dtype)
    right = torch.randn(size, size, generator=generator).to(device, dtype)
    return 2.0 * size**3 / _seconds(lambda: left @ right, device)


def eigen_rate(device: torch.device, size: int) -> float:
    """Measure FLOP/s of a checked float64 symmetric eigendecomposition, counted as 9 size^3."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size, size, generator=generator, dtype=torch.float64).to(device)
    square = rows @ rows.T
    return 9.0 * size**3 / _seconds(lambda: Eigensolver().decompose(square, upper=True), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
