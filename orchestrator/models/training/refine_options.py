"""How compressed blocks are refined: the options, the learning rate, and what is held out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from orchestrator.errors import UsageError
from orchestrator.recipe.options import check_number, check_whole

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """How blocks are trained; the values given are AA-SVD's where that has one."""

    epochs: int = 25
    """The most times that every training chunk is used; the schedule's length, however it ends."""
    batches: int = 8
    """Steps an epoch. The training chunks are divided among them as evenly as they can be."""
    slices: int = 8
    """Parts that a step's gradient is summed from, where a block is lent: its most workers.

    A part sums its chunks one by one, then the parts are summed in their order; so with one part,
    or one for each chunk, the bits are those of a sum over the chunks. Eight are the GPUs of a
    node; each part travels to every worker, 4 bytes a trained parameter.
    """
    learning_rate: float = 1e-4
    """The highest, at the end of the warm-up."""
    weight_decay: float = 0.01
    warm_up: float = 0.1
    """Part of all steps in which the rate rises linearly."""
    floor: float = 0.1
    """Part of the rate at which the cosine ends."""
    clip: float = 1.0
    """Largest norm of a step's gradient; a larger one is scaled down to it."""
    held_out: float = 0.125
    """Part of the chunks that is not trained on and decides which state is the best."""
    patience: int = 5
    """Epochs without a better state after which training ends."""
    dense: bool = False
    """Whether dense weights are trained too; the linears that stayed whole and untargeted ones."""

    def __post_init__(self) -> None:
        check_whole("refinement: epochs", self.epochs, 1, 10_000)
        check_whole("refinement: batches", self.batches, 1, 10_000)
        check_whole("refinement: slices", self.slices, 1, 10_000)
        check_number("refinement: learning_rate", self.learning_rate, 0, 1)
        check_number("refinement: weight_decay", self.weight_decay, 0, 1)
        check_number("refinement: warm_up", self.warm_up, 0, 1)
        check_number("refinement: floor", self.floor, 0, 1)
        check_number("refinement: clip", self.clip, 1e-12, 1e12)
        check_number("refinement: held_out", self.held_out, 1e-6, 0.5)
        check_whole("refinement: patience", self.patience, 1, 10_000)
        if not isinstance(self.dense, bool):
            raise UsageError(f"refinement: dense is {self.dense!r}; it must be true or false")


class RateOptions(Protocol):
    """The options that say how the learning rate goes."""

    @property
    def learning_rate(self) -> float: ...

    @property
    def warm_up(self) -> float: ...

    @property
    def floor(self) -> float: ...


def rate(step: int, steps: int, options: RateOptions) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then a cosine to the floor."""
    warm = int(options.warm_up * steps)
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    turn = math.cos(math.pi * (step - warm) / (steps - warm))
    return options.learning_rate * (options.floor + (1 - options.floor) * (1 + turn) / 2)


def split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Which of `count` chunks are trained on and which are held out, evenly spaced, one at least.

    4 of 32 are 4, 12, 20 and 28.

    Raises:
        ValueError: Fewer than two chunks.
    """
    if count < 2:
        raise ValueError(f"{count} chunks; one to train on and one to hold out are needed")
    number = max(round(count * held_out), 1)
    chosen = [(2 * i + 1) * count // (2 * number) for i in range(number)]
    return [i for i in range(count) if i not in set(chosen)], chosen


def divide(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """Contiguous parts whose lengths differ by one at most, the longer ones first."""
    size, longer = divmod(len(items), parts)
    stops = [size * (part + 1) + min(part + 1, longer) for part in range(parts)]
    return [items[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
