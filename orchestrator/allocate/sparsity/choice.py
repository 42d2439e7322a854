"""Choice of the candidates to keep within a budget, from keep-probabilities.

Shape suffixes: N candidates of all linears, K of them in an order, M linears.
"""

from dataclasses import dataclass

import numpy as np

from orchestrator.allocate.sparsity.bernoulli import CandidatePool
from orchestrator.plan.forms import LOW_RANK


@dataclass(frozen=True, slots=True)
class Choice:
    """Number of kept draws of every candidate, and the linears that stay dense."""

    kept_N: np.ndarray
    """int64; all draws of the linears in `dense`."""
    dense: frozenset[str]


def choose(pool: CandidatePool, probability_N: np.ndarray, budget: int) -> Choice:
    """Choose the candidates with the largest probabilities within the budget.

    Ties are broken by utility, then by the order of the linears, directions before entries, and
    index. The first direction of each linear precedes all other candidates, and ranks stay below
    break-even. Candidates that do not fit are skipped; a bucket is kept partially if necessary,
    with its entries of largest utility. A linear whose choice would store as much as the dense
    weight stays dense, at the cost of the dense weight, which releases the excess.

    O(n log n) per round in which linears become dense.
    """
    values_M = np.array([linear.values for linear in pool.linears], dtype=np.int64)
    if budget >= int(values_M.sum()):
        return Choice(pool.count_N.copy(), frozenset(each.name for each in pool.linears))
    order = _order(pool, probability_N)
    dense_M = np.array([LOW_RANK.break_even(linear) <= 1 for linear in pool.linears])
    while True:
        left = budget - int(values_M[dense_M].sum())
        kept_N = np.where(dense_M[pool.owner_N], pool.count_N, 0)
        _take(pool, order[~dense_M[pool.owner_N[order]]], left, kept_N)
        cost_M = np.bincount(pool.owner_N, kept_N * pool.cost_N, minlength=len(values_M))
        surplus_M = (cost_M >= values_M) & ~dense_M
        if not surplus_M.any():
            names = [pool.linears[index].name for index in np.flatnonzero(dense_M)]
            return Choice(kept_N, frozenset(names))
        dense_M |= surplus_M


def _order(pool: CandidatePool, probability_N: np.ndarray) -> np.ndarray:
    """Return the indices of the candidates that may be kept, in the order of choice."""
    order = np.lexsort((np.arange(len(probability_N)), -pool.utility_N, -probability_N))
    owners = pool.owner_N[order]
    directions = np.flatnonzero(pool.is_direction_N[order])
    # index of each direction among those of its linear
    by_owner = directions[np.argsort(owners[directions], kind="stable")]
    starts = np.searchsorted(owners[by_owner], owners[by_owner])
    rank_N = np.full(len(order), -1)
    rank_N[by_owner] = np.arange(len(by_owner)) - starts
    last_M = np.array([LOW_RANK.break_even(linear) - 1 for linear in pool.linears])
    return np.concatenate([order[rank_N == 0], order[(rank_N != 0) & (rank_N < last_M[owners])]])


def _take(pool: CandidatePool, order: np.ndarray, budget: int, kept_N: np.ndarray) -> None:
    """Write to `kept_N` the candidates that the budget holds, in this order."""
    weight_K = pool.weight_N[order]
    is_direction_K = pool.is_direction_N[order]
    spent_K = np.concatenate([[0], np.cumsum(weight_K)])
    place = 0
    while place < len(order) and budget > 0:
        stop = int(np.searchsorted(spent_K, spent_K[place] + budget, side="right")) - 1
        taken = order[place:stop]
        kept_N[taken] = pool.count_N[taken]
        budget -= int(spent_K[stop] - spent_K[place])
        if stop < len(order) and not is_direction_K[stop]:
            kept_N[order[stop]] = budget
            return
        place = stop + 1
