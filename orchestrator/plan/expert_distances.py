"""Distances of experts: the input of an allocation that merges them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDistances:
    """Distances of the mean output of an expert from those of all experts of its block."""

    name: str
    """Name of a linear of the expert."""
    tokens: int
    """Calibration tokens that were routed to the expert."""
    distances: tuple[float, ...] = ()
    """By the number of the other expert; only `down` has them."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "tokens": self.tokens, "distances": list(self.distances)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ExpertDistances":
        """Read the result of `to_json`; raises InputError if it is not one."""
        try:
            distances = tuple(map(float, value["distances"]))
            return cls(name=str(value["name"]), tokens=int(value["tokens"]), distances=distances)
        except (LookupError, TypeError, ValueError) as error:
            said = repr(str(error)[:200])
            raise InputError(f"distances: a field is missing or no number: {said}") from error
