"""Commands of a walk: the rounds of a block, for all of its replicas."""

from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.runtime.replicated_blocks import ReplicaCommand


@dataclass(frozen=True, slots=True, kw_only=True)
class Look(ReplicaCommand):
    """Open a block, pass dense chunks on, and measure the error of the compressed ones."""

    method: ClassVar[str] = "look"

    block: int
    is_made: bool
    """True if its unit is committed, so that chunks only pass through it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensate(ReplicaCommand):
    """Fit the block's factors again, in each replica."""

    method: ClassVar[str] = "compensate"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateHeldOut(ReplicaCommand):
    """Measure the error on held-out chunks."""

    method: ClassVar[str] = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Descend(ReplicaCommand):
    """Compute the slices of a step's gradient."""

    method: ClassVar[str] = "descend"

    epoch: int
    batch: int
    keep: bool
    """True if the state before the step is the best one so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(ReplicaCommand):
    """Pass compressed chunks through the block's best state, and measure their error."""

    method: ClassVar[str] = "leave"

    keep: bool
    """True if the present state is the best one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitBlock(ReplicaCommand):
    """Commit the block in one replica, and free it in all."""

    method: ClassVar[str] = "commit"

    facts: dict[str, Any]
