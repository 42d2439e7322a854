"""Commands of the pipeline that trains the whole model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.runtime.calls import Command


@dataclass(frozen=True, slots=True)
class TakeShard(Command):
    """Load a shard in its state at a snapshot."""

    method: ClassVar[str] = "take"

    blocks: tuple[int, int]
    """Its first block, and the one after its last."""
    step: int
    """Step of the snapshot; 0: the shard as it was planned."""


@dataclass(frozen=True, slots=True)
class PassCommand(Command):
    """Base of commands that read a chunk and may emit one: the method takes it as `record`."""

    serial: int
    """Number of the pass of a sequence in its period."""


@dataclass(frozen=True, slots=True)
class Forward(PassCommand):
    """Pass a sequence on, and keep the inputs that its backward pass needs."""

    method: ClassVar[str] = "forward"

    sequence: int


@dataclass(frozen=True, slots=True)
class Turn(PassCommand):
    """Pass a sequence through the last shard and back. Returns its losses."""

    method: ClassVar[str] = "turn"

    sequence: int
    divergence: float
    """Weight of a token's divergence in the loss of the step."""
    cross_entropy: float
    """Weight of a prediction's cross-entropy in the loss of the step."""
    is_last: bool
    """True if it completes the gradient of the step."""


@dataclass(frozen=True, slots=True)
class Backward(PassCommand):
    """Pass the gradients of a sequence back."""

    method: ClassVar[str] = "backward"

    is_last: bool
    """True if it completes the gradient of the step."""


@dataclass(frozen=True, slots=True)
class EvaluateSequence(PassCommand):
    """Pass a held-out sequence on; the last shard gives its losses."""

    method: ClassVar[str] = "evaluate"

    sequence: int


@dataclass(frozen=True, slots=True)
class Update(Command):
    """Take a step of the optimiser."""

    method: ClassVar[str] = "update"

    step: int
    scale: float
    """Factor of the gradient, by which its norm is clipped."""
    rate: float


@dataclass(frozen=True, slots=True)
class SaveSnapshot(Command):
    """Commit the state of the shard's blocks."""

    method: ClassVar[str] = "snapshot"

    step: int


@dataclass(frozen=True, slots=True)
class KeepValues(Command):
    """Commit the values of the shard's blocks in place of earlier ones, if the step is the best."""

    method: ClassVar[str] = "keep"

    step: int
    is_best: bool


@dataclass(frozen=True, slots=True)
class CommitTrained(Command):
    """Commit the parameters of blocks at the best step."""

    method: ClassVar[str] = "commit"

    blocks: tuple[int, int]
    """The first block, and the one after the last."""
    step: int
    facts: Mapping[str, Any]
    is_kept: bool
    """True if `KeepValues` has committed the values."""
