"""Commands of the learning of scores, beside those of the pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.runtime.calls import Command


@dataclass(frozen=True, slots=True)
class UpdateScores(Command):
    """Take a step of the optimiser, with the weights of the size's slope and the polarisation."""

    method: ClassVar[str] = "update"

    step: int
    rate: float
    penalty: float
    polarisation: float


@dataclass(frozen=True, slots=True)
class CommitScores(Command):
    """Commit the scores of a block after the last step, from its snapshot."""

    method: ClassVar[str] = "commit"

    block: int
    step: int
    facts: Mapping[str, Any]
