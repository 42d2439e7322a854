"""Units of learned scores: the order in which a plan keeps the stored directions of its linears.

Shape suffixes: K stored directions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from orchestrator.store.run import RunDirectory
from orchestrator.store.units import UnitWriter

SCORES_FILE = "scores.safetensors"
PARTS = ("order", "scores", "gains")
ADAPTERS_FILE = "adapters.safetensors"


class DirectionScores(NamedTuple):
    """Scores of the directions of one linear."""

    order_K: np.ndarray
    """Indices of the stored directions, best first, int32."""
    scores: np.ndarray
    """Scores in this order, and last that of all that the directions leave, float32 [K + 1]; those
    of the directions of an adapter come first, if there is one."""
    gains_K: np.ndarray | None = None
    """Factors of the directions in this order, float32; None: all are 1."""

    @property
    def adapters(self) -> int:
        """Rank of the adapter; 0: there is none."""
        return len(self.scores) - 1 - len(self.order_K)

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """Return numbers of stored directions in the order in which they are kept; those of an
        adapter, which come first, are 0."""
        return np.append(np.zeros(self.adapters), values[self.order_K])


def order_by_score(scores: np.ndarray, gains: np.ndarray | None = None) -> DirectionScores:
    """Sort scores of stored directions [K], and of the tail behind them; ties keep their order.

    Directions are stored by descending energy, so that ties are in the order of energies.

    Args:
        gains: Of the stored directions; None: all are 1.
    """
    order_K = np.argsort(-scores[:-1], kind="stable").astype(np.int32)
    gains_K = None if gains is None else gains[order_K]
    return DirectionScores(order_K, np.append(scores[:-1][order_K], scores[-1]), gains_K)


def with_adapters(found: DirectionScores, rank: int) -> DirectionScores:
    """Add the scores of an adapter's directions: they and the best direction are always kept."""
    if not rank:
        return found
    first = np.full(rank + 1, np.inf, dtype=found.scores.dtype)
    return found._replace(scores=np.append(first, found.scores[1:]))


def write_adapters(unit: UnitWriter, rows: Mapping[str, Tensor]) -> None:
    """Write the adapters of a block as a file of a unit, by `NAME.weight` and `NAME.down`."""
    with unit.file(ADAPTERS_FILE) as path:
        save_tensors(dict(rows), path)


def write_scores(unit: UnitWriter, found: Mapping[str, DirectionScores]) -> None:
    """Write the scores of the linears of a block as a file of a unit."""
    arrays: dict[str, np.ndarray] = {}
    for name, each in found.items():
        parts = zip(PARTS, each, strict=True)
        arrays |= {f"{name}.{part}": array for part, array in parts if array is not None}
    with unit.file(SCORES_FILE) as path:
        save_file(arrays, path)


def write_gains(unit: UnitWriter, gains: Mapping[str, np.ndarray]) -> None:
    """Write the gains of the linears of a block, each of the directions that its plan keeps."""
    with unit.file(SCORES_FILE) as path:
        save_file({f"{name}.gains": gains_K for name, gains_K in gains.items()}, path)


def read_gains(run: RunDirectory, key: str) -> dict[str, np.ndarray]:
    """Return the gains of a unit of scores, or of gains alone, by linear."""
    arrays = load_file(run.units.file(key, SCORES_FILE))
    return {
        name.removesuffix(".gains"): array
        for name, array in arrays.items()
        if name.endswith(".gains")
    }


def read_scores(run: RunDirectory, key: str) -> dict[str, DirectionScores]:
    """Return the scores of a unit, by linear."""
    arrays = load_file(run.units.file(key, SCORES_FILE))
    names = [name.removesuffix(".order") for name in arrays if name.endswith(".order")]
    return {
        name: DirectionScores(*(arrays[f"{name}.{p}"] for p in PARTS if f"{name}.{p}" in arrays))
        for name in names
    }
