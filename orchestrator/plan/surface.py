"""Loss of one linear that is kept as entries with factors beside them.

Indices: P points of a linear, ordered by entries, then by rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Measured losses of one linear by its number of entries and the rank of factors beside them.

    The points of each number of entries include rank 0. Entries alone can be of any number;
    factors exist only beside measured numbers of entries, up to the largest rank there.
    Plain data; JSON keeps it unchanged.
    """

    name: str
    nonzeros: np.ndarray
    """int64 [P]."""
    ranks: np.ndarray
    """int64 [P]."""
    losses: np.ndarray
    """Losses in one unit for all linears, float64 [P]."""
    activation_losses: np.ndarray
    """Squared error of the outputs, float64 [P]."""
    weight_losses: np.ndarray
    """Squared error of the weight, float64 [P]."""

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in self.__slots__[1:]}
        return {"name": self.name, **arrays}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Surface":
        kinds: dict[str, type[np.generic]] = dict.fromkeys(cls.__slots__[1:], np.float64)
        kinds |= {"ranks": np.int64, "nonzeros": np.int64}
        arrays = {name: np.asarray(value[name], dtype=kind) for name, kind in kinds.items()}
        return cls(name=value["name"], **arrays)

    def loss(self, rank: int, nonzeros: int) -> float:
        """Return the loss of this mix; monotonic in the rank, and in entries alone."""
        return self._between(self.losses, rank, nonzeros, falls=True)

    def _between(self, losses: np.ndarray, rank: int, nonzeros: int, *, falls: bool) -> float:
        """Interpolate between two points: by rank, or by entries alone.

        The norm is interpolated, since it is closer to linear than its square.
        """
        here = self.nonzeros == nonzeros if rank else self.ranks == 0
        kept, most = (self.ranks, rank) if rank else (self.nonzeros, nonzeros)
        known = np.minimum.accumulate(losses[here]) if falls else losses[here]
        return float(np.interp(most, kept[here], np.sqrt(known))) ** 2

    def largest_ranks(self) -> dict[int, int]:
        """Return the largest rank of factors by the number of entries beside them."""
        starts = np.flatnonzero(self.ranks == 0)
        last = np.append(starts[1:], len(self.ranks)) - 1
        pairs = zip(self.nonzeros[last].tolist(), self.ranks[last].tolist(), strict=True)
        return {nonzeros: rank for nonzeros, rank in pairs if rank}

    def errors(self, rank: int, nonzeros: int) -> dict[str, float]:
        """Return the relative errors of outputs and weight; 1 is the loss of keeping nothing."""
        found = {}
        for name in ("activation", "weight"):
            losses = getattr(self, f"{name}_losses")
            lost, whole = self._between(losses, rank, nonzeros, falls=False), float(losses[0])
            found[f"{name}_error"] = lost / whole if whole else 0.0
        return found
