"""Curves of very many linears: each at some of its ranks, with a bound on what that loses.

A driver that holds 560,000 full curves, as of a model with thousands of experts, would hold
gigabytes. At 128 knots it holds half a kilobyte a linear and a number.
"""

from dataclasses import dataclass

import numpy as np

from orchestrator.plan.curve import Curve

MOST = 128
"""Knots of a curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knots:
    """A curve at some ranks; between two of them the energy counts as spread evenly."""

    name: str
    ranks: np.ndarray
    """Ascending from 1, int32 [knots]."""
    energies: np.ndarray
    """Of the ranks behind the knot before, up to this one, float32 [knots]."""
    total: float
    error: float
    """Bound: at no rank is `loss` further above the curve's than this part of the total."""

    def loss(self, rank: int) -> float:
        """As of a curve; at a rank between knots never below it, for energies descend."""
        before = np.concatenate([[0], self.ranks])
        captured = np.concatenate([[0.0], np.cumsum(self.energies, dtype=np.float64)])
        return max(self.total - float(np.interp(rank, before, captured)), 0.0)


def sample_curve(curve: Curve, last: int, most: int = MOST) -> Knots:
    """A curve up to a rank, at `most` knots at most.

    Linear interpolation errs by an eighth of the second difference times the squared distance of
    the knots, so these lie as densely as the root of the second difference. What the error then is
    is measured at every rank, not estimated. O(last).

    Args:
        last: The largest rank that factors can have, break-even less one.
    """
    energies = curve.energies[:last]
    if last <= most:
        ranks = np.arange(1, last + 1)
    else:
        curvature = np.sqrt(np.maximum(-np.diff(energies), 0.0))
        # a part is spread evenly, so that no piece of a straight curve goes without a knot
        density = np.cumsum(np.append(curvature / (curvature.sum() or 1.0), 0.0) + 0.25 / last)
        wanted = np.linspace(0, density[-1], most)
        places = np.searchsorted(density, wanted, side="left") + 1
        ranks = np.unique(np.clip(np.concatenate([[1], places[1:-1], [last]]), 1, last))
    captured = np.concatenate([[0.0], np.cumsum(energies)])
    edges = np.concatenate([[0], ranks])
    between = np.interp(np.arange(last + 1), edges, captured[edges])
    gap = float(np.max(captured - between, initial=0.0))
    return Knots(
        name=curve.name,
        ranks=ranks.astype(np.int32),
        energies=np.diff(captured[edges]).astype(np.float32),
        total=curve.total,
        error=gap / curve.total if curve.total > 0 else 0.0,
    )
