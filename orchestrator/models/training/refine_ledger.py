"""What a refinement does in which order, what it has given so far, and when it is over.

Plain numbers, no tensors: whoever makes the gradients, one process or many, this decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.models.training.refine_options import RefineOptions, split

Stop = Literal["end", "patience", "diverged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one epoch gave."""

    train: float
    """Mean squared error over the training tokens, each batch before its own step."""
    held_out: float
    """Mean squared error over the held-out tokens, after the last step."""
    gradient: float
    """Mean over the steps of the gradient's norm before it is clipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a refinement came to."""

    start: float
    """The held-out loss before the first step."""
    epochs: tuple[Epoch, ...]
    best: int
    """Epochs after which the state was the best; 0 is the start, bit for bit."""
    steps: int
    stop: Stop

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "start": self.start,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "steps": self.steps,
            "stop": self.stop,
        }


class Ledger:
    """A refinement's account as it grows: told of batches, steps and held-out errors, in order.

    Args:
        sequences: Chunks in all, trained on and held out.

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
        self._forget()

    def _forget(self) -> None:
        """A new epoch's sums."""
        self._train = self._tokens = self._gradient = 0.0

    def parts(self, batch: int) -> int:
        """In how many slices a batch's gradient is made."""
        size, larger = divmod(len(self.training), self.batches)
        return min(self._options.slices, size + (batch < larger))

    @property
    def stop(self) -> Stop | None:
        """Why training is over; None while it is not."""
        done = len(self.epochs)
        if done and not math.isfinite(self.epochs[-1].held_out):
            return "diverged"
        if done == self._options.epochs:
            return "end"
        return "patience" if done - self.best >= self._options.patience else None

    def summed(self, losses: Sequence[float], tokens: int) -> None:
        """A batch's chunks gave these parts of its loss, in their order; it has so many tokens."""
        self._train += sum(losses) * tokens
        self._tokens += tokens

    def stepped(self, norm: float) -> None:
        """A step was made with a gradient that had this norm."""
        self._gradient += norm

    def evaluated(self, found: Sequence[tuple[int, float]]) -> bool:
        """Tokens and errors of the held-out chunks, first of the start, then behind every epoch.

        Whether no state before was as good.
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
        self._forget()
        if held_out < lowest:
            self.best = len(self.epochs)
        return held_out < lowest

    def account(self) -> Account:
        """What it has come to."""
        assert self.start is not None
        return Account(
            start=self.start,
            epochs=tuple(self.epochs),
            best=self.best,
            steps=len(self.epochs) * self.batches,
            stop=self.stop or "end",
        )

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on from the facts of an account that was not at its end."""
        self.start, self.best = facts["start"], facts["best"]
        self.epochs = [Epoch(**epoch) for epoch in facts["epochs"]]
