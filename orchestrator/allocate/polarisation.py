"""Course of gates that a loss polarises: its weights by step, budgets, and thresholds.

Reconstruction after SoCo (arXiv 2502.15092), whose abstract names three phases with a fixed number
of steps each, coarse exploration under a parameter ratio, oscillatory refinement and polarising
sparsification; lengths, weights and the form of the oscillation are ours.

Indices: N gates.
"""

import math
from collections.abc import Sequence

import numpy as np

SHARES = (0.5, 0.25, 0.25)
"""Fractions of the steps in the phases: exploration, refinement, sparsification."""
WAVES = 4
"""Oscillations of the weight in the refinement."""
HEIGHT = 0.1
"""Largest weight in the refinement, as a fraction of the last one."""


def polarisation_at(step: int, steps: int, last: float) -> float:
    """Return the weight λ2 of the polarisation in a step, counted from 1, of `steps`.

    It is 0 in the exploration; HEIGHT last (1 - cos(2π WAVES u)) / 2 in the refinement, u from 0 to
    1 over it; and rises linearly from 0 to `last` over the sparsification, reached in the last
    step. A function of the step alone.
    """
    explored, refined = SHARES[0] * steps, (SHARES[0] + SHARES[1]) * steps
    if step <= explored:
        return 0.0
    if step <= refined:
        place = (step - explored) / (refined - explored)
        return HEIGHT * last * (1 - math.cos(2 * math.pi * WAVES * place)) / 2
    return last * (step - refined) / (steps - refined)


def pull_at(kept: float, target: float, weight: float) -> float:
    """Return the slope of weight · |kept - target| by the kept fraction; 0 at the target."""
    return weight * ((kept > target) - (kept < target))


def drawn_budget(budgets: Sequence[float], words: tuple[int, ...]) -> float:
    """Draw the budget of a step, by the words of its generator (`Randomness.budget`)."""
    return budgets[int(np.random.default_rng(words).integers(len(budgets)))]


def threshold_at(gates_N: np.ndarray, costs_N: np.ndarray, values: float) -> float:
    """Return the least threshold above which gates cost no more than `values` together.

    Of equal gates all are above it or none, so that neither their order nor a cut of the model
    matters. -inf if all gates fit. O(N log N).
    """
    order_N = np.argsort(-gates_N, kind="stable")
    over_N = np.cumsum(costs_N[order_N], dtype=np.float64) > values
    return float(gates_N[order_N[over_N.argmax()]]) if over_N.any() else -math.inf
