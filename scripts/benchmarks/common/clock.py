"""Wall-clock times of work on a device, with synchronisation before and after."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device; no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return the result of one call, and its seconds."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start


def median_seconds(
    work: Callable[[], object], device: torch.device, *, repeats: int = 3, warm_up: int = 1
) -> float:
    """Return the median seconds of some calls after warm-up; results are dropped."""
    for _ in range(warm_up):
        work()
    return statistics.median(timed(work, device)[1] for _ in range(repeats))
