"""Commands that more than one kind of compression worker knows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.runtime.calls import Command


@dataclass(frozen=True, slots=True)
class PivotLinear(Command):
    """Bring the factors of a linear to pivoted storage."""

    method: ClassVar[str] = "pivot"

    name: str
    rank: int


@dataclass(frozen=True, slots=True)
class WriteFile(Command):
    """Write a file of the checkpoint."""

    method: ClassVar[str] = "write"

    file: Mapping[str, Any]
    """The file's layout, a `FileSpec` as JSON."""
    choice: str = ""
    """Key of the unit with the kept candidates; empty: the method has none."""
