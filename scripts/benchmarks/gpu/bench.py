"""Input and output of a part."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from benchmarks.common.clock import median_seconds, timed
from benchmarks.gpu.results import Results

Size = TypeVar("Size")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Check:
    """A checked statement, or a number with a bound."""

    name: str
    found: bool | float
    bound: float | None = None

    @property
    def holds(self) -> bool:
        if self.bound is None:
            return self.found is True
        return math.isfinite(self.found) and self.found < self.bound

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "found": self.found, "bound": self.bound, "holds": self.holds}


@dataclass(frozen=True, slots=True)
class PartResult:
    """Results of a part."""

    line: str
    """The figures that matter most, to be printed."""
    figures: Any
    """All of them, as plain data."""
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class Bench:
    """The device, the sizes, and the time that is left."""

    device: torch.device
    work: Path
    """A directory for models and runs, the same for all parts."""
    results: Results
    deadline: float
    """End of the time for all parts, on the system's monotonic clock."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, large: Size, small: Size) -> Size:
        """The first, or with --small the second."""
        return small if self.results.is_small else large

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        return timed(work, self.device)

    def median_seconds(
        self, work: Callable[[], object], *, repeats: int = 3, warm_up: int = 1
    ) -> float:
        return median_seconds(work, self.device, repeats=repeats, warm_up=warm_up)

    def free(self) -> None:
        """Return unused memory to the device and resets the peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Peak bytes of tensors on the device since `free`; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else None

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)
