"""Bookkeeping of a refinement: batches and slices, losses so far, and the stopping rule.

Works on plain numbers without tensors, so that it is the same for gradients from one process or
from many.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.models.training.refine_options import RefineOptions, split

Stop = Literal["end", "patience", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Losses and gradient norm of one epoch."""

    train: float
    """Mean squared error over the training tokens, each batch evaluated before its own step."""
    held_out: float
    """Mean squared error over the held-out tokens, after the last step."""
    gradient: float
    """Gradient norm before clipping, mean over the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Outcome of a refinement."""

    start: float
    """Held-out loss before the first step."""
    epochs: tuple[Epoch, ...]
    best: int
    """Number of epochs after which the state was best; 0: the initial state, bit for bit."""
    steps: int
    stop: Stop

    def facts(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "start": self.start,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "steps": self.steps,
            "stop": self.stop,
        }


def losses_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Losses by epoch from the facts of an account; the held-out ones begin with the start."""
    epochs = facts["epochs"]
    return {
        "train": [epoch["train"] for epoch in epochs],
        "held_out": [facts["start"], *(epoch["held_out"] for epoch in epochs)],
        "best": facts["best"],
    }


class Ledger:
    """Running account of a refinement, updated in order with batches, steps and held-out errors.

    Args:
        sequences: Total number of chunks, training and held out.

    Raises:
        ValueError: Fewer than two chunks.
    """

    def __init__(self, sequences: int, options: RefineOptions) -> None:
        self.training, self.held_out = split(sequences, options.held_out)
        self.batches = min(options.batches, len(self.training))
        """Steps an epoch."""
        self.start: float | None = None
        self.epochs: list[Epoch] = []
        self.best = 0
        self._options = options
        self._reset()

    def _reset(self) -> None:
        """Reset the sums for a new epoch."""
        self._train = self._tokens = self._gradient = 0.0

    def parts(self, batch: int) -> int:
        """Number of slices of a batch's gradient."""
        size, larger = divmod(len(self.training), self.batches)
        return min(self._options.slices, size + (batch < larger))

    @property
    def stop(self) -> Stop | None:
        """Reason why training has ended; None while it has not."""
        done = len(self.epochs)
        if done and not math.isfinite(self.epochs[-1].held_out):
            return "diverged"
        if done == self._options.epochs:
            return "end"
        return "patience" if done - self.best >= self._options.patience else None

    def summed(self, losses: Sequence[float], tokens: int) -> None:
        """Record a batch: the losses of its chunks in order, and its number of tokens."""
        self._train += sum(losses) * tokens
        self._tokens += tokens

    def stepped(self, norm: float) -> None:
        """Record a step by the norm of its gradient before clipping."""
        self._gradient += norm

    def evaluated(self, found: Sequence[tuple[int, float]]) -> bool:
        """Record tokens and errors of the held-out chunks: first for the start, then per epoch.

        Returns True if the state is the best so far.
        """
        tokens = sum(number for number, _ in found)
        held_out = sum(error for _, error in found) / max(tokens, 1)
        if self.start is None:
            self.start = held_out
            return True
        lowest = self.epochs[self.best - 1].held_out if self.best else self.start
        epoch = Epoch(
            train=self._train / self._tokens,
            held_out=held_out,
            gradient=self._gradient / self.batches,
        )
        self.epochs.append(epoch)
        self._reset()
        if held_out < lowest:
            self.best = len(self.epochs)
        return held_out < lowest

    def account(self) -> Account:
        """Return the outcome so far."""
        assert self.start is not None
        return Account(
            start=self.start,
            epochs=tuple(self.epochs),
            best=self.best,
            steps=len(self.epochs) * self.batches,
            stop=self.stop or "end",
        )
