"""Candidates of one linear between which an allocation chooses one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Directions and entries of one linear by descending utility per stored value.

    Plain data; JSON keeps it unchanged.
    """

    direction_utilities: np.ndarray
    direction_magnitudes: np.ndarray
    """Singular values."""
    bucket_counts: np.ndarray
    """Entries of each bucket, int64."""
    bucket_utilities: np.ndarray
    """Mean over the bucket's entries."""
    bucket_magnitudes: np.ndarray
    """Mean |S| over the bucket's entries."""
    energy: float
    """Energy of the whole weight, in the unit of the utilities."""

    def to_json(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name).tolist() for name in self.__slots__[:-1]}
        return {**arrays, "energy": self.energy}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Candidates":
        kinds = dict.fromkeys(cls.__slots__[:-1], np.float64) | {"bucket_counts": np.int64}
        arrays = {name: np.asarray(value[name], dtype=kind) for name, kind in kinds.items()}
        return cls(**arrays, energy=value["energy"])
