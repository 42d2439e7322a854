"""Saliency of an expert: the input of an allocation that drops whole experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Saliency:
    """Mean over its tokens of the norm that an expert adds to the residual stream."""

    name: str
    """Name of a linear of the expert."""
    mean: float
    tokens: int
    """Calibration tokens that were routed to the expert."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "mean": self.mean, "tokens": self.tokens}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Saliency":
        """Read the result of `to_json`; raises InputError if it is not one."""
        try:
            mean, tokens = float(value["mean"]), int(value["tokens"])
            return cls(name=str(value["name"]), mean=mean, tokens=tokens)
        except (LookupError, TypeError, ValueError) as error:
            said = repr(str(error)[:200])
            raise InputError(f"saliency: a field is missing or no number: {said}") from error
