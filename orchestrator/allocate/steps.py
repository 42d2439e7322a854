"""Ranks of a linear as a chain of steps, and the selection of steps within a budget.

A linear has a step for each allowed rank below break-even (`AllowedRanks`), and a last one that
makes it dense, at the additional cost of the dense weight. Costs are stored values, or those of
`AllowedRanks.cost`. Without an allowed rank
the only step is the dense weight. Every rank costs the same; of pivoted factors, each rank costs
less than the one before. For a curve known at some ranks only (`SampledCurve`) a step takes all
ranks up to the next sample. An allocator orders the steps by keys; `spend` takes them.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from orchestrator.errors import InfeasibleError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

EVERY_RANK = AllowedRanks()
"""Every rank of two plain factors."""
NEVER_GAINS = np.finfo(np.float64).max
"""Key of a step without gain: after all others, but taken if there is room."""


class Steps(NamedTuple):
    """Steps in the order in which they are taken."""

    cost_K: np.ndarray
    """Cost that each step adds, int64."""
    gain_K: np.ndarray
    """Loss that each step takes away."""


def step_costs(
    linear: Linear, ranks: AllowedRanks = EVERY_RANK, ends: np.ndarray | None = None
) -> np.ndarray:
    """Return the cost that each step adds, int64 [steps]; their sum is that of the dense weight.

    Args:
        ends: Final ranks of the steps except the dense one, ascending; None means every allowed
            rank.
    """
    ends = ranks.of(linear) if ends is None else ends
    spent = np.zeros(len(ends) + 2, dtype=np.int64)
    spent[1:-1] = ranks.price(linear, ends.astype(np.int64))
    spent[-1] = ranks.cost.dense(linear)
    costs: np.ndarray = spent[1:] - spent[:-1]
    return costs


def _order_by_key(
    keys: Iterable[np.ndarray], counts: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, int]:
    """Sort all steps, first steps before others; also count the steps with finite keys."""
    all_keys = np.empty(first[-1])
    for start, count, key in zip(first, counts, keys, strict=False):
        assert key.shape == (count,)
        assert np.all(key[1:] >= key[:-1]), "a step must not precede those that it depends on"
        all_keys[start : start + count] = key
    all_keys[first[:-1]] = -np.inf
    return np.argsort(all_keys, kind="stable"), int(np.count_nonzero(all_keys < np.inf))


def spend(
    linears: Sequence[Linear],
    keys: Iterable[np.ndarray],
    budget: int,
    *,
    where: str,
    ranks: AllowedRanks = EVERY_RANK,
    ends: Sequence[np.ndarray | None] | None = None,
) -> dict[str, Assignment]:
    """Take steps in ascending order of their keys until the next one does not fit.

    `keys[i]` is float64 [steps of linear i] and never descends. The first steps of all linears come
    before all others, regardless of their keys; ties follow the order of the linears; a step with
    an infinite key is never taken. The remainder is less than the cost of the next step and stays
    unused: no cheaper step is taken out of order. Therefore the steps of a smaller budget are a
    subset of those of a larger one with the same keys, and if keys are costs per gain, no plan with
    as few values gains more. A step of several samples is taken partially if necessary.

    Multiples are large steps, whose remainder would cost quality: it pays for further steps that
    fit, in the same order, so that a rank may fall as the budget grows.

    O(n log n) in the number of steps, about 40 bytes each.

    Args:
        keys: Consumed one at a time, so that a generator saves memory.
        ends: Final ranks of the steps of each linear, as for `step_costs`.

    Raises:
        InfeasibleError: The first steps alone cost more than the budget; `where` is named in the
            message.
    """
    ends = [None] * len(linears) if ends is None else ends
    costs = [step_costs(linear, ranks, end) for linear, end in zip(linears, ends, strict=True)]
    counts = np.array([len(cost) for cost in costs])
    first = np.concatenate([[0], np.cumsum(counts)])
    spent = np.concatenate(costs)
    order, wanted = _order_by_key(keys, counts, first)
    spent = spent[order]
    np.cumsum(spent, out=spent)
    least = int(spent[len(linears) - 1])
    if least > budget:
        raise InfeasibleError(
            f"{where}: a share of {budget} values is below {ranks.smallest} for each of "
            f"{len(linears)} linears, which stores {least}; keep more, or --ignore some"
        )
    taken = min(int(np.searchsorted(spent, budget, side="right")), wanted)
    left = budget - int(spent[taken - 1])
    is_taken = np.zeros(len(order), dtype=bool)
    is_taken[order[:taken]] = True
    steps = np.add.reduceat(is_taken, first[:-1], dtype=np.int64)
    is_sampled = any(end is not None for end in ends)
    if not is_sampled and any(ranks.step(linear) > 1 for linear in linears):
        fill_steps(steps, order, spent, first, left=left, wanted=wanted)
    following = int(np.searchsorted(first, order[taken], "right")) - 1 if taken < wanted else -1
    return {
        linear.name: Assignment(form="dense")
        if steps[place] == counts[place]
        else cut_at(linear, int(steps[place]), ranks, end, left=left if place == following else 0)
        for place, (linear, end) in enumerate(zip(linears, ends, strict=True))
    }


def spend_shares(
    linears: Sequence[Linear], shares: Sequence[int], budget: int, ranks: AllowedRanks
) -> dict[str, Assignment]:
    """Take the steps that the share of each linear holds, then those that exceed it least.

    Ties follow the order of the linears.

    Raises:
        InfeasibleError: As `spend`.
    """
    keys = [
        np.cumsum(step_costs(each, ranks)) - share
        for each, share in zip(linears, shares, strict=True)
    ]
    return spend(linears, keys, budget, where="the model", ranks=ranks)


def cut_at(
    linear: Linear, steps: int, ranks: AllowedRanks, end: np.ndarray | None, *, left: int
) -> Assignment:
    """Return the assignment of steps before the dense one; between samples at `left` more
    cost."""
    rank = steps * ranks.step(linear) if end is None else int(end[steps - 1])
    if end is not None and left and steps < len(end):
        rank = ranks.within(linear, ranks.price(linear, rank) + left)
    return Assignment(form=ranks.form.name, rank=rank)


def fill_steps(
    steps: np.ndarray,
    order: np.ndarray,
    spent: np.ndarray,
    first: np.ndarray,
    *,
    left: int,
    wanted: int,
) -> None:
    """Add further steps to those of each linear, in order and as long as they fit.

    A step that does not fit ends those of its linear.

    Args:
        steps: Steps taken of each linear; changed.
        order: Steps of all linears in their order.
        spent: Sum of the costs up to each place of the order.
        first: First step of each linear, and the number of all.
        left: Values that are left.
        wanted: Number of steps in the order that may be taken.
    """
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    following = first[:-1] + steps
    waiting = [(int(place[f]), i) for i, f in enumerate(following) if f < first[i + 1]]
    heapq.heapify(waiting)
    while waiting:
        at, linear = heapq.heappop(waiting)
        cost = int(spent[at] - (spent[at - 1] if at else 0))
        if at >= wanted or cost > left:
            continue
        left -= cost
        steps[linear] += 1
        if (after := int(first[linear] + steps[linear])) < first[linear + 1]:
            heapq.heappush(waiting, (int(place[after]), linear))


def rates(cost_K: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """Compute cost per gain; a step is not taken before those that it depends on."""
    without_gain_K = np.where(cost_K > 0, NEVER_GAINS, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rate_K = np.where(gain_K > 0, cost_K / gain_K, without_gain_K)
    return np.maximum.accumulate(np.minimum(rate_K, NEVER_GAINS))


def hull_rates(cost_K: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """Compute the cost per gain of the segment of the lower convex hull that contains each step.

    Steps that gain more per value than earlier ones are taken together with them. The last segment
    starts where the line to the end has the least slope, which finds it at once; before it,
    adjacent segments in the wrong order are merged until there are none, in any order. O(K) per
    round, with few rounds, since energies descend.
    """
    # remaining gain and cost before each step; summing from the small end loses no digits
    steps = len(cost_K)
    gain_left_K, cost_left_K = np.zeros(steps + 1), np.zeros(steps + 1, dtype=np.int64)
    np.cumsum(gain_K[::-1], out=gain_left_K[:-1][::-1])
    np.cumsum(cost_K[::-1], out=cost_left_K[:-1][::-1])
    last = int(np.argmin(gain_left_K[:-1] / cost_left_K[:-1]))
    edges = np.append(np.arange(last + 1), steps)
    while True:
        costs = cost_left_K[edges[:-1]] - cost_left_K[edges[1:]]
        gains = gain_left_K[edges[:-1]] - gain_left_K[edges[1:]]
        is_late = gains[1:-1] * costs[:-2] > gains[:-2] * costs[1:-1]
        if not is_late.any():
            return np.repeat(rates(costs, gains), edges[1:] - edges[:-1])
        edges = np.delete(edges, np.flatnonzero(is_late) + 1)
