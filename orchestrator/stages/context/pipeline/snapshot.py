"""Measurements at the snapshots of a training, and reasons for its end."""

from dataclasses import dataclass
from typing import Literal

Stop = Literal["end", "patience", "diverged", "size"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Measurements at a snapshot; the first one is the start."""

    step: int
    train: float | None
    """Loss over the training sequences since the last snapshot, each before its own step."""
    held_out: float
    """Loss over the held-out sequences, which decides."""
    divergence: float
    """Mean KL(dense || compressed) over the held-out tokens."""
    cross_entropy: float
    """Mean over the held-out predictions."""
    gradient: float | None
    """Mean norm of the gradient before clipping, over the steps."""
