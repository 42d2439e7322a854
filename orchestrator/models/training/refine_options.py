"""Options of the refinement, the learning-rate schedule, and the split of the chunks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from orchestrator.errors import UsageError
from orchestrator.recipe.options import check_number, check_whole

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """Options of the block-wise training; defaults are AA-SVD's where it has one."""

    epochs: int = 25
    """Largest number of epochs; also the length of the schedule, even if training ends earlier."""
    batches: int = 8
    """Steps per epoch; the training chunks are divided among them as evenly as possible."""
    slices: int = 8
    """Slices of a step's gradient; for a replicated block also the largest number of workers.

    A slice sums its chunks one by one, then the slices are summed in order; with one slice, or one
    per chunk, the bits are those of a sum over the chunks. The default of eight is the number of
    GPUs of a node. Each slice is sent to every worker, 4 bytes per trained parameter.
    """
    learning_rate: float = 1e-4
    """Largest learning rate, reached at the end of the warm-up."""
    weight_decay: float = 0.01
    warm_up: float = 0.1
    """Fraction of all steps over which the rate rises linearly."""
    floor: float = 0.1
    """Final value of the cosine, as a fraction of the largest rate."""
    clip: float = 1.0
    """Largest norm of a step's gradient; larger gradients are scaled down to it."""
    held_out: float = 0.125
    """Fraction of the chunks held out from training to choose the best state."""
    patience: int = 5
    """Training ends after this number of epochs without a better state."""
    dense: bool = False
    """Also train dense weights: linears that the plan left dense, and untargeted ones."""

    def __post_init__(self) -> None:
        check_whole("refinement: batches", self.batches, 1, 10_000)
        check_whole("refinement: slices", self.slices, 1, 10_000)
        check_optimizer_options("refinement", self)
        if not isinstance(self.dense, bool):
            raise UsageError(f"refinement: dense is {self.dense!r}; it must be true or false")


class OptimizerOptions(Protocol):
    """Options of AdamW, its schedule and its stopping rule, which refinement and training have."""

    @property
    def epochs(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def warm_up(self) -> float: ...

    @property
    def floor(self) -> float: ...

    @property
    def clip(self) -> float: ...

    @property
    def held_out(self) -> float: ...

    @property
    def patience(self) -> int: ...


def check_optimizer_options(table: str, options: OptimizerOptions) -> None:
    """Raise UsageError for an option that is not allowed; `table` names the table of options."""
    check_whole(f"{table}: epochs", options.epochs, 1, 10_000)
    check_number(f"{table}: learning_rate", options.learning_rate, 0, 1)
    check_number(f"{table}: weight_decay", options.weight_decay, 0, 1)
    check_number(f"{table}: warm_up", options.warm_up, 0, 1)
    check_number(f"{table}: floor", options.floor, 0, 1)
    check_number(f"{table}: clip", options.clip, 1e-12, 1e12)
    check_number(f"{table}: held_out", options.held_out, 1e-6, 0.5)
    check_whole(f"{table}: patience", options.patience, 1, 10_000)


def rate(step: int, steps: int, options: OptimizerOptions) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then a cosine to the floor."""
    warm = int(options.warm_up * steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    cosine = math.cos(math.pi * (step - warm) / (steps - warm))
    return options.learning_rate * (options.floor + (1 - options.floor) * (1 + cosine) / 2)


def split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Split `count` chunks into training and held-out indices.

    At least one is held out, evenly spaced: 4, 12, 20 and 28 for 4 of 32 chunks.

    Raises:
        ValueError: Fewer than two chunks.
    """
    if count < 2:
        raise ValueError(f"{count} chunks; at least one to train on and one to hold out are needed")
    number = max(round(count * held_out), 1)
    chosen = [(2 * i + 1) * count // (2 * number) for i in range(number)]
    return [i for i in range(count) if i not in set(chosen)], chosen


def divide(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """Divide items into contiguous parts whose lengths differ by at most one, longer ones first."""
    size, longer = divmod(len(items), parts)
    stops = [size * (part + 1) + min(part + 1, longer) for part in range(parts)]
    return [items[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
