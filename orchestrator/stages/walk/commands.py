"""Commands of the rounds of a block, which all of its replicas execute."""

from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.runtime.replicated_blocks import ReplicaCommand


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardDense(ReplicaCommand):
    """Open a block, pass chunks through the dense one, and measure the compressed one's error."""

    method: ClassVar[str] = "forward_dense"

    block: int
    is_committed: bool
    """True if the unit of the block is committed, so that chunks only pass through it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensate(ReplicaCommand):
    """Refit the block's factors, in each replica."""

    method: ClassVar[str] = "compensate"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateHeldOut(ReplicaCommand):
    """Measure the error on held-out chunks."""

    method: ClassVar[str] = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeGradients(ReplicaCommand):
    """Compute slices of a step's gradient."""

    method: ClassVar[str] = "compute_gradients"

    epoch: int
    batch: int
    keep: bool
    """True if the state before the step is the best so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCompressed(ReplicaCommand):
    """Pass chunks through the best state of the compressed block, and measure its error."""

    method: ClassVar[str] = "forward_compressed"

    keep: bool
    """True if the present state is the best one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitBlock(ReplicaCommand):
    """Commit the block in one replica, and free it in all."""

    method: ClassVar[str] = "commit"

    facts: dict[str, Any]
