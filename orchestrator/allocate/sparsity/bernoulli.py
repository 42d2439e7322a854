"""Keep-probabilities of candidates, and their updates from losses.

A candidate is a singular direction of a linear (one draw, m + n stored values) or a bucket of
sparse entries with a common probability (one draw of one value per entry). Pure functions: losses
and numbers of draws in, probabilities out.

Shape suffix: N candidates of all linears, in the order of the linears, directions before buckets.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from orchestrator.plan.candidates import Candidates
from orchestrator.plan.linear import Linear

Init = Literal["utility", "magnitude", "constant"]
Across = Literal["linear", "relative", "absolute"]
Projection = Literal["shift", "euclid", "multiplicative"]
LEAST_PROBABILITY = 1e-3
"""Bound of the probabilities in the first author's code: they are in [1e-3, 1 - 1e-3], and a
multiplicative update cannot leave this range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePool:
    """Candidates of all linears, concatenated."""

    linears: tuple[Linear, ...]
    owner_N: np.ndarray
    """Index of the linear of each candidate."""
    is_direction_N: np.ndarray
    count_N: np.ndarray
    """Number of draws: 1 for a direction, the number of entries for a bucket."""
    cost_N: np.ndarray
    """Stored values per draw: m + n, or 1."""
    utility_N: np.ndarray
    """Utility of a draw per stored value."""
    magnitude_N: np.ndarray

    @property
    def weight_N(self) -> np.ndarray:
        """Stored values of a candidate that is kept completely."""
        weight_N: np.ndarray = self.cost_N * self.count_N
        return weight_N

    def split(self, value_N: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Split values by linear, into those of its directions and those of its buckets."""
        found = {}
        for index, linear in enumerate(self.linears):
            start, stop = np.searchsorted(self.owner_N, [index, index + 1])
            middle = start + int(self.is_direction_N[start:stop].sum())
            found[linear.name] = value_N[start:middle], value_N[middle:stop]
        return found

    def join(self, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Concatenate the result of `split` to one array."""
        return np.concatenate([part for each in self.linears for part in parts[each.name]])


def make_pool(
    linears: Sequence[Linear],
    candidates: Mapping[str, Candidates],
    across: Across = "absolute",
    keep: float = 1.0,
) -> CandidatePool:
    """Build the pool of these linears; its order breaks ties.

    Args:
        across: Divisor of the utilities: 1 (`absolute`), the energy of their linear (`relative`),
            or the utility at which a greedy choice within their linear has spent the fraction
            `keep` of its values (`linear`).
    """
    parts = [candidates[linear.name] for linear in linears]
    ranks = [len(part.direction_utilities) for part in parts]
    buckets = [len(part.bucket_counts) for part in parts]
    sizes = np.array(ranks) + np.array(buckets)
    ones = [np.ones(rank, dtype=np.int64) for rank in ranks]
    directions = [np.arange(size) < rank for size, rank in zip(sizes, ranks, strict=True)]
    rank_cost_N = np.repeat([linear.rank_cost for linear in linears], sizes)
    is_direction_N = np.concatenate(directions)
    utility_N = _alternate(
        [part.direction_utilities for part in parts], [part.bucket_utilities for part in parts]
    )
    units = [_unit(e, part, across, keep) for e, part in zip(linears, parts, strict=True)]
    return CandidatePool(
        linears=tuple(linears),
        owner_N=np.repeat(np.arange(len(linears)), sizes),
        is_direction_N=is_direction_N,
        count_N=_alternate(ones, [part.bucket_counts for part in parts]),
        cost_N=np.where(is_direction_N, rank_cost_N, 1),
        utility_N=utility_N / np.repeat(units, sizes),
        magnitude_N=_alternate(
            [part.direction_magnitudes for part in parts],
            [part.bucket_magnitudes for part in parts],
        ),
    )


def _unit(linear: Linear, part: Candidates, across: Across, keep: float) -> float:
    """Return the divisor of a linear's utilities; 1 instead of 0."""
    if across == "absolute":
        return 1.0
    if across == "relative":
        return part.energy or 1.0
    utility_N = np.concatenate([part.direction_utilities, part.bucket_utilities])
    whole_R = np.full(len(part.direction_utilities), linear.rank_cost)
    weight_N = np.concatenate([whole_R, part.bucket_counts])
    return _break_point(utility_N, weight_N, keep * linear.values) or 1.0


def _break_point(utility_N: np.ndarray, weight_N: np.ndarray, budget: float) -> float:
    """Return the utility at which a greedy choice exhausts the budget, or the last one."""
    order = np.argsort(-utility_N, kind="stable")
    last = min(int(np.searchsorted(np.cumsum(weight_N[order]), budget)), len(order) - 1)
    return float(utility_N[order[last]])


def _alternate(first: Iterable[np.ndarray], second: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([part for pair in zip(first, second, strict=True) for part in pair])


def initial(pool: CandidatePool, budget: int, init: Init, temperature: float) -> np.ndarray:
    """Compute the initial probabilities, before projection on the budget, [N].

    `utility`: sigmoid((log u - log u*) / temperature), u* the utility at which a greedy choice by
    utility exhausts the budget. `magnitude`: |value| over the largest of the pool, clipped to
    [0.05, 0.95], as in the first author's code; there singular values dominate entries. `constant`:
    one half each.
    """
    if init == "constant":
        return np.full(len(pool.owner_N), 0.5)
    if init == "magnitude":
        largest = float(pool.magnitude_N.max()) or 1.0
        return np.clip(pool.magnitude_N / largest, 0.05, 0.95)
    # zero has no logarithm: replace it by the smallest value distinguishable beside the largest
    least = max(float(pool.utility_N.max()) * 1e-300, np.finfo(np.float64).tiny)
    log_N = np.log(np.maximum(pool.utility_N, least))
    middle = np.log(max(_break_point(pool.utility_N, pool.weight_N, budget), least))
    distance_N = (log_N - middle) / temperature
    probability_N: np.ndarray = 1 / (1 + np.exp(-np.clip(distance_N, -700, 700)))
    return probability_N


def project(
    pool: CandidatePool, probability_N: np.ndarray, budget: int, projection: Projection
) -> np.ndarray:
    """Project probabilities so that their expected stored values meet the budget from below, [N].

    `shift` minimises Σ cost (s - s0)² over all draws, so s = clip(s0 - ν, 0, 1). `euclid` minimises
    Σ (s - s0)²: s = clip(s0 - ν cost, 0, 1), which lowers a direction m + n times as much as an
    entry. `multiplicative`: s = clip(a max(s0, 1e-3), 1e-3, 1 - 1e-3), as in the first author's
    code. ν and a are found by bisection to adjacent floats. The loss falls with every kept
    candidate, so the budget is met, not only respected; all probabilities are 1 if the budget holds
    the whole pool.
    """
    weight_N = pool.weight_N.astype(np.float64)
    if weight_N.sum() <= budget:
        return np.ones_like(probability_N)
    if projection == "multiplicative":
        low, high = LEAST_PROBABILITY, 1 - LEAST_PROBABILITY
        if low * weight_N.sum() > budget or high * weight_N.sum() <= budget:
            return np.full_like(probability_N, budget / weight_N.sum())
        start_N = np.maximum(probability_N, low)

        def at(point: float) -> np.ndarray:
            return np.asarray(np.clip(start_N * math.exp(-point), low, high))
    else:
        step_N = pool.cost_N if projection == "euclid" else np.ones_like(pool.cost_N)

        def at(point: float) -> np.ndarray:
            return np.asarray(np.clip(probability_N - point * step_N, 0.0, 1.0))

    # the expected cost falls with the point: above the budget at one end, zero or minimal at the
    # other
    reach = 20.0 if projection == "multiplicative" else float(np.abs(probability_N).max()) + 1
    above, below = -reach, reach
    while above < (middle := (above + below) / 2) < below:
        if float(at(middle) @ weight_N) <= budget:
            below = middle
        else:
            above = middle
    return at(below)


def score_function(
    probability_N: np.ndarray, drawn_N: np.ndarray, count_N: np.ndarray, eps: float
) -> np.ndarray:
    """Compute ∂ log p(draws) / ∂s as Σ (m - s) / (s (1 - s) + eps), [N]; `eps` avoids division by
    0.

    The sum is over the draws of a candidate, of which `drawn_N` were kept. With eps = 0 its product
    with a loss is an unbiased estimate of the gradient of the expected loss; with eps each
    component is shrunk by s (1 - s) / (s (1 - s) + eps).
    """
    variance_N = probability_N * (1 - probability_N)
    excess_N = drawn_N - count_N * probability_N
    # probabilities 0 and 1 have no variance; their excess is rounding
    certain_N = variance_N + eps <= 0
    score_N: np.ndarray = np.where(
        certain_N, 0, excess_N / np.where(certain_N, 1, variance_N + eps)
    )
    return score_N


@dataclass(slots=True)
class Baseline:
    """Baseline of a loss: a mean of earlier losses, so that the estimate stays unbiased.

    The first loss is its own baseline and has no effect.
    """

    kind: Literal["window", "ema"] = "window"
    window: int = 5
    beta: float = 0.9
    _last: deque[float] = field(default_factory=deque)

    def advantage(self, loss: float) -> float:
        """Return the loss less the baseline, then add the loss to the baseline."""
        if not self._last:
            self._last.append(loss)
            return 0.0
        if self.kind == "ema":
            (mean,) = self._last
            self._last[0] = self.beta * mean + (1 - self.beta) * loss
            return loss - mean
        mean = sum(self._last) / len(self._last)
        self._last.append(loss)
        while len(self._last) > self.window:
            self._last.popleft()
        return loss - mean


@dataclass(frozen=True, slots=True)
class Draw:
    """One masked model: number of kept draws of each candidate, and its loss."""

    drawn_N: np.ndarray
    loss: float


def learn(
    pool: CandidatePool,
    probability_N: np.ndarray,
    draws: Sequence[Draw],
    baseline: Baseline,
    *,
    eta: float,
    eps: float,
) -> np.ndarray:
    """Take one REINFORCE step with the mean over the draws, before projection on the budget, [N].

    The step of a bucket is the mean of the steps of its entries: its score, a sum over entries, is
    divided by their number. It thus moves as far as entries with separate probabilities do on
    average, and `eta` has the same meaning for buckets of any size.
    """
    step_N = np.zeros_like(probability_N)
    for draw in draws:
        score_N = score_function(probability_N, draw.drawn_N, pool.count_N, eps) / pool.count_N
        step_N += baseline.advantage(draw.loss) * score_N / len(draws)
    return probability_N - eta * step_N
