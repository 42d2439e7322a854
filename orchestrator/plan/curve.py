"""Loss of truncating one linear, as a function of its rank.

Indices: K directions of a linear, S = K + 1 steps of it, the last one its dense weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from orchestrator.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Truncation loss of one linear by rank r: `total - sum(energies[:r])`.

    `energies` are the squared singular values of the weight in the method's norm, descending,
    float64, at least up to the break-even rank; `total` is the sum of all of them. For a sparse
    form they are the energies of equal slices of the entries, in the order in which entries are
    kept, and r counts slices.
    """

    name: str
    energies: np.ndarray
    total: float
    sensitivities: Mapping[int, float] = field(default_factory=dict)
    """Mean cross-entropy of the model with this linear alone truncated, by rank, at the ranks that
    an allocation asks for. Measured separately; not part of the JSON."""

    scores: np.ndarray | None = None
    """Learned scores of the directions, descending, and of all that they leave of the weight; not
    part of the JSON. The energies are then those of the directions in this order."""

    def loss(self, rank: int) -> float:
        """Squared error, in the method's norm, of the best approximation of this rank."""
        return max(self.total - float(self.energies[:rank].sum()), 0.0)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "energies": self.energies.tolist(), "total": self.total}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Curve":
        """Read the result of `to_json`; raises InputError if it is not one."""
        try:
            energies = np.asarray(value["energies"], dtype=np.float64)
            curve = cls(name=str(value["name"]), energies=energies, total=float(value["total"]))
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            said = repr(str(error)[:200])
            raise InputError(f"curve: a field is missing or no number: {said}") from error
        if energies.ndim != 1:
            raise InputError(f"curve: energies have {energies.ndim} dimensions, one is needed")
        return curve


class PathCurve(NamedTuple):
    """Losses of the gates of a linear by its curve."""

    worth_S: np.ndarray
    """Loss that a step takes away, on the lower convex hull, in nats a token and value; descending,
    infinite for the first one, which is always kept. float64."""
    energy_K: np.ndarray
    """Loss of closing a direction alone, in nats a token, float64."""
    loss_S: np.ndarray
    """Loss of keeping no step, the first one, ..., all but the last, in nats a token, float64."""
