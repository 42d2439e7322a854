"""Keep-probabilities of candidates, and how they learn from losses.

A candidate is a singular direction of a linear (one draw, of m + n stored values) or a bucket of
sparse entries that share one probability (as many draws as entries, of one value each). Pure:
losses and counts of draws come in, probabilities go out.

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
LEAST_SHARE = 1e-3
"""Bounds of the first author's probabilities, [1e-3, 1 - 1e-3], which a factor cannot leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePool:
    """The candidates of all linears, one after the other."""

    linears: tuple[Linear, ...]
    owner_N: np.ndarray
    """Index of the linear."""
    is_direction_N: np.ndarray
    count_N: np.ndarray
    """Draws: 1 for a direction, the entries of a bucket."""
    cost_N: np.ndarray
    """Stored values of one draw: m + n, or 1."""
    utility_N: np.ndarray
    """Utility of a draw over its cost."""
    magnitude_N: np.ndarray

    @property
    def weight_N(self) -> np.ndarray:
        """Stored values of a candidate that is kept whole."""
        weight_N: np.ndarray = self.cost_N * self.count_N
        return weight_N

    def split(self, value_N: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Values by linear: those of its directions and those of its buckets."""
        found = {}
        for index, linear in enumerate(self.linears):
            start, stop = np.searchsorted(self.owner_N, [index, index + 1])
            middle = start + int(self.is_direction_N[start:stop].sum())
            found[linear.name] = value_N[start:middle], value_N[middle:stop]
        return found

    def join(self, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """What `split` gave, as one array again."""
        return np.concatenate([part for each in self.linears for part in parts[each.name]])


def make_pool(
    linears: Sequence[Linear],
    candidates: Mapping[str, Candidates],
    across: Across = "absolute",
    share: float = 1.0,
) -> CandidatePool:
    """The pool of these linears; its order is the tie-break of every choice.

    Args:
        across: What utilities are measured by: nothing (`absolute`), their own linear's energy
            (`relative`), or the utility at which a greedy choice from their own linear exhausts
            this share of its values (`linear`).
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
    units = [_unit(e, part, across, share) for e, part in zip(linears, parts, strict=True)]
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


def _unit(linear: Linear, part: Candidates, across: Across, share: float) -> float:
    """What a linear's utilities are divided by; 1 where that would be nothing."""
    if across == "absolute":
        return 1.0
    if across == "relative":
        return part.energy or 1.0
    utility_N = np.concatenate([part.direction_utilities, part.bucket_utilities])
    whole_R = np.full(len(part.direction_utilities), linear.rank_cost)
    weight_N = np.concatenate([whole_R, part.bucket_counts])
    return _break_point(utility_N, weight_N, share * linear.values) or 1.0


def _break_point(utility_N: np.ndarray, weight_N: np.ndarray, budget: float) -> float:
    """The utility at which a greedy choice by utility exhausts the budget, or its last one."""
    order = np.argsort(-utility_N, kind="stable")
    last = min(int(np.searchsorted(np.cumsum(weight_N[order]), budget)), len(order) - 1)
    return float(utility_N[order[last]])


def _alternate(first: Iterable[np.ndarray], second: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([part for pair in zip(first, second, strict=True) for part in pair])


def initial(pool: CandidatePool, budget: int, init: Init, temperature: float) -> np.ndarray:
    """Probabilities before anything is learnt, not yet on the budget, [N].

    `utility`: sigmoid((log u - log u*) / temperature), u* the utility at which a greedy choice by
    utility exhausts the budget. `magnitude`: |value| over the largest of the pool, clipped to
    [0.05, 0.95], as the first author's code has it; singular values dwarf entries there.
    `constant`: one half each.
    """
    if init == "constant":
        return np.full(len(pool.owner_N), 0.5)
    if init == "magnitude":
        largest = float(pool.magnitude_N.max()) or 1.0
        return np.clip(pool.magnitude_N / largest, 0.05, 0.95)
    # zero has no logarithm: it counts as the least that stands out beside the largest
    least = max(float(pool.utility_N.max()) * 1e-300, np.finfo(np.float64).tiny)
    log_N = np.log(np.maximum(pool.utility_N, least))
    middle = np.log(max(_break_point(pool.utility_N, pool.weight_N, budget), least))
    distance_N = (log_N - middle) / temperature
    share_N: np.ndarray = 1 / (1 + np.exp(-np.clip(distance_N, -700, 700)))
    return share_N


def project(
    pool: CandidatePool, share_N: np.ndarray, budget: int, projection: Projection
) -> np.ndarray:
    """The nearest probabilities whose expected stored values are the budget, from below, [N].

    `shift` minimises Σ cost (s - s0)² over all draws, so s = clip(s0 - ν, 0, 1). `euclid`
    minimises Σ (s - s0)²: s = clip(s0 - ν cost, 0, 1), which takes from a direction m + n times
    what it takes from an entry. `multiplicative`: s = clip(a max(s0, 1e-3), 1e-3, 1 - 1e-3),
    the first author's. ν and a by bisection down to neighbouring floats. The loss falls with all
    that is kept, so the budget is spent rather than kept under; all are 1 where it holds the whole
    pool.
    """
    weight_N = pool.weight_N.astype(np.float64)
    if weight_N.sum() <= budget:
        return np.ones_like(share_N)
    if projection == "multiplicative":
        low, high = LEAST_SHARE, 1 - LEAST_SHARE
        if low * weight_N.sum() > budget or high * weight_N.sum() <= budget:
            return np.full_like(share_N, budget / weight_N.sum())
        start_N = np.maximum(share_N, low)

        def at(point: float) -> np.ndarray:
            return np.asarray(np.clip(start_N * math.exp(-point), low, high))
    else:
        step_N = pool.cost_N if projection == "euclid" else np.ones_like(pool.cost_N)

        def at(point: float) -> np.ndarray:
            return np.asarray(np.clip(share_N - point * step_N, 0.0, 1.0))

    # the expected cost falls with the point: too much at one end, nothing or the least at the other
    reach = 20.0 if projection == "multiplicative" else float(np.abs(share_N).max()) + 1
    above, below = -reach, reach
    while above < (middle := (above + below) / 2) < below:
        if float(at(middle) @ weight_N) <= budget:
            below = middle
        else:
            above = middle
    return at(below)


def score_function(
    share_N: np.ndarray, drawn_N: np.ndarray, count_N: np.ndarray, eps: float
) -> np.ndarray:
    """∂ log p(draws) / ∂s, with `eps` against division by zero: Σ (m - s) / (s (1 - s) + eps), [N].

    The sum is over a candidate's draws, of which `drawn_N` were kept. With eps = 0 its product
    with a loss is an unbiased estimate of the gradient of the expected loss; with eps each
    component is shrunk by s (1 - s) / (s (1 - s) + eps).
    """
    variance_N = share_N * (1 - share_N)
    excess_N = drawn_N - count_N * share_N
    # probabilities 0 and 1 leave nothing to chance, and no excess but rounding
    certain_N = variance_N + eps <= 0
    score_N: np.ndarray = np.where(
        certain_N, 0, excess_N / np.where(certain_N, 1, variance_N + eps)
    )
    return score_N


@dataclass(slots=True)
class Baseline:
    """What a loss is compared with: a mean of losses that came before it, so no bias arises.

    The very first loss is compared with itself and teaches nothing.
    """

    kind: Literal["window", "ema"] = "window"
    window: int = 5
    beta: float = 0.9
    _last: deque[float] = field(default_factory=deque)

    def advantage(self, loss: float) -> float:
        """The loss over the baseline; the baseline then knows it too."""
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
    """One masked model: how many of each candidate's draws were kept, and its loss."""

    drawn_N: np.ndarray
    loss: float


def learn(
    pool: CandidatePool,
    share_N: np.ndarray,
    draws: Sequence[Draw],
    baseline: Baseline,
    *,
    eta: float,
    eps: float,
) -> np.ndarray:
    """One step of REINFORCE with the mean over the draws, not yet back on the budget, [N].

    A bucket moves by the mean of its entries' steps: its score is a sum over them, and is divided
    by their number. So it moves as far as entries with probabilities of their own would on
    average, and `eta` means the same in a bucket of one and of a million.
    """
    step_N = np.zeros_like(share_N)
    for draw in draws:
        score_N = score_function(share_N, draw.drawn_N, pool.count_N, eps) / pool.count_N
        step_N += baseline.advantage(draw.loss) * score_N / len(draws)
    return share_N - eta * step_N
