"""Conversion of scores to fractions by one common factor, subject to bounds and a total."""

import numpy as np

LEAST_SCORE = 1e-12
"""Lower limit of scores, so that equal scores give equal fractions down to zero."""


def find_scale(
    score_N: np.ndarray,
    size_N: np.ndarray,
    total: float,
    *,
    low: float | np.ndarray,
    high: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Find fractions clip(a · score, low, high) with weighted sum `total`, from below and above.

    The sum grows with a, so bisection to adjacent floats brackets the root. Both ends are returned,
    so that the caller chooses the side that must not be exceeded. A total outside the reach of the
    bounds gives the bound itself, twice. Each fraction grows with `total`. `low` is one number or
    [N].
    """
    score_N = np.maximum(score_N, LEAST_SCORE)

    def fractions_at(scale: float) -> np.ndarray:
        return np.clip(scale * score_N, low, high)

    below, above = 0.0, high / float(score_N.min())
    if float(fractions_at(above) @ size_N) <= total:
        return fractions_at(above), fractions_at(above)
    while below < (middle := (below + above) / 2) < above:
        if float(fractions_at(middle) @ size_N) <= total:
            below = middle
        else:
            above = middle
    return fractions_at(below), fractions_at(above)
