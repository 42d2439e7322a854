"""Sampled curves for models with very many linears: energies at some ranks, with an error bound.

560,000 full curves, as for a model with thousands of experts, would take gigabytes in the driver.
With 128 samples, a curve takes half a kilobyte per array.
"""

from dataclasses import dataclass

import numpy as np

from orchestrator.plan.curve import Curve

MOST = 128
"""Maximum number of samples of a curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledCurve:
    """Curve at some ranks; between two of them the energy counts as spread evenly."""

    name: str
    ranks: np.ndarray
    """Ascending from the smallest allowed rank, int32 [samples]."""
    energies: np.ndarray
    """Energy of the ranks after the previous sample up to this one, float32 [samples]."""
    total: float
    error: float
    """Bound: at every rank, `loss` exceeds that of the curve by at most this fraction of the
    total."""

    def loss(self, rank: int) -> float:
        """Return the loss of a rank, as `Curve.loss`; between samples never below it, since
        energies descend."""
        before = np.concatenate([[0], self.ranks])
        captured = np.concatenate([[0.0], np.cumsum(self.energies, dtype=np.float64)])
        return max(self.total - float(np.interp(rank, before, captured)), 0.0)


def sample_curve(curve: Curve, last: int, most: int = MOST, step: int = 1) -> SampledCurve:
    """Sample a curve up to a rank, with at most `most` samples.

    The error of linear interpolation is an eighth of the second difference times the squared
    distance of the samples, so the density of samples follows the square root of the second
    difference. The resulting error is measured at every rank. O(last).

    Args:
        last: Largest rank of the factors: break-even less one, or the last multiple below it.
        step: Number of which the sampled ranks are multiples; it divides `last`.
    """
    energies = curve.energies[:last]
    if last <= most * step:
        ranks = np.arange(step, last + 1, step)
    else:
        curvature = np.sqrt(np.maximum(-np.diff(energies), 0.0))
        # a part is spread evenly, so that straight pieces of a curve get samples too
        density = np.cumsum(np.append(curvature / (curvature.sum() or 1.0), 0.0) + 0.25 / last)
        wanted = np.linspace(0, density[-1], most)
        places = np.searchsorted(density, wanted, side="left") + 1
        places = -(-np.concatenate([[1], places[1:-1], [last]]) // step) * step
        ranks = np.unique(np.clip(places, step, last))
    captured = np.concatenate([[0.0], np.cumsum(energies)])
    edges = np.concatenate([[0], ranks])
    between = np.interp(np.arange(last + 1), edges, captured[edges])
    gap = float(np.max(captured - between, initial=0.0))
    return SampledCurve(
        name=curve.name,
        ranks=ranks.astype(np.int32),
        energies=np.diff(captured[edges]).astype(np.float32),
        total=curve.total,
        error=gap / curve.total if curve.total > 0 else 0.0,
    )
