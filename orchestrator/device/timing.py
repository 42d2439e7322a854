"""Times of computations, measured in turn so that a change of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MOST_ROUNDS, LEAST_ROUNDS = 9, 3
ENOUGH_SECONDS = 5.0
"""Time after which measured computations are not repeated further."""


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Clock of one device.

    With one thread on a CPU it counts the processor seconds of this thread, which other programs
    hardly lengthen; otherwise the time that passes, after all work of a GPU is done.
    """

    device: torch.device

    @property
    def is_processor(self) -> bool:
        """True if processor seconds are counted."""
        return self.device.type == "cpu" and torch.get_num_threads() == 1

    def now(self) -> float:
        """Return seconds since an arbitrary moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.thread_time() if self.is_processor else time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the time of one call."""
        start = self.now()
        work()
        return self.now() - start


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the same computation, at least one."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the upper and the lower quarter over the median; 0 for a single time."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median if self.median else 0.0


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    least: float = 0.0,
) -> dict[str, Times]:
    """Measure each computation once in every round, after one call each that does not count.

    The order is reversed from round to round, so that none always follows the same other one. After
    `ENOUGH_SECONDS` no further round begins, from `LEAST_ROUNDS` to `MOST_ROUNDS`.

    Args:
        runs: Computations by name.
        least: Seconds of a round below which the calls of a computation are repeated within it.
    """
    watch, found = Stopwatch(device), {name: list[float]() for name in runs}
    repeats = dict.fromkeys(runs, 1)
    for name, work in runs.items():
        work()
        if least:
            repeats[name] = 1 + int(least / max(watch.seconds(work), 1e-6))
    names, begun = [*runs], time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - begun > ENOUGH_SECONDS:
            break
        for name in names:
            work, count = runs[name], repeats[name]
            start = watch.now()
            for _ in range(count):
                work()
            found[name].append((watch.now() - start) / count)
        names.reverse()
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}
