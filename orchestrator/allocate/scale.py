"""Scores to fractions: one factor for all, found so that bounds and a total are met."""

import numpy as np

LEAST_SCORE = 1e-12
"""A smaller score counts as this one, so that equal scores stay equal down to zero."""


def find_scale(
    score_N: np.ndarray, size_N: np.ndarray, *, low: float, high: float, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fractions clip(a · score, low, high) whose sum over size is `total`, from below and above.

    The sum grows with a, so bisection down to neighbouring floats brackets the root; both ends
    are returned for the caller to choose the side that must not be passed. A total that the
    bounds do not reach gives the bound itself, twice. Each fraction grows with `total`.
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
