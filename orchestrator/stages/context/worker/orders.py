"""Units of learned scores: the order in which a plan keeps the stored directions of its linears.

Shape suffixes: K stored directions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from orchestrator.store.run import RunDirectory
from orchestrator.store.units import UnitWriter

SCORES_FILE = "scores.safetensors"


class DirectionScores(NamedTuple):
    """Scores of the directions of one linear."""

    order_K: np.ndarray
    """Indices of the stored directions, best first, int32."""
    scores: np.ndarray
    """Scores in this order, and last that of all that the directions leave, float32 [K + 1]."""


def order_by_score(scores: np.ndarray) -> DirectionScores:
    """Sort scores of stored directions [K], and of the tail behind them; ties keep their order.

    Directions are stored by descending energy, so that ties are in the order of energies.
    """
    order_K = np.argsort(-scores[:-1], kind="stable").astype(np.int32)
    return DirectionScores(order_K, np.append(scores[:-1][order_K], scores[-1]))


def write_scores(unit: UnitWriter, found: Mapping[str, DirectionScores]) -> None:
    """Write the scores of the linears of a block as a file of a unit."""
    arrays = {}
    for name, each in found.items():
        arrays[f"{name}.order"], arrays[f"{name}.scores"] = each
    with unit.file(SCORES_FILE) as path:
        save_file(arrays, path)


def read_scores(run: RunDirectory, key: str) -> dict[str, DirectionScores]:
    """Return the scores of a unit, by linear."""
    arrays = load_file(run.units.file(key, SCORES_FILE))
    names = [name.removesuffix(".order") for name in arrays if name.endswith(".order")]
    return {n: DirectionScores(arrays[f"{n}.order"], arrays[f"{n}.scores"]) for n in names}
