"""Ranks and entries of all linears under one budget, by measured losses of both together.

Indices: P points of a linear, ordered by entries, then by rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.allocate.budget import budget_values, least_values, make_plan
from orchestrator.allocate.threshold import hull_rates
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.surface import Surface


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSparseAllocator:
    """Minimises the summed loss over entries and rank of every linear, under one budget.

    Of each linear the lower convex hull of the measured losses over stored values, n entries and
    r (m + n) values of factors, the dense weight its last corner, is a chain of pieces of falling
    gain a value. The pieces of all linears are bought in that order, and of the one that does not
    fit as many values as are left. For the values that a linear then has, the best it can be is
    taken: entries alone, or factors beside one of the measured numbers of entries. So the plan is
    the optimum, of those at measured points, for every budget that ends at a corner; only the last
    linear may leave values unspent, less than its piece.

    Laws: those of `orchestrator.allocate`, where a linear's stored values stand for its rank, which
    may fall where entries take over. The least of a linear is the values of rank 1, kept as that
    rank or as as many entries.

    O(P log P) in the points of all linears. Divides what method `two-sided-sparse` stores.
    """

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Any],
        keep: float,
        cosines: Mapping[str, float],
    ) -> Plan:
        """The plan; `curves` are `Surface`s.

        Raises:
            UsageError, InfeasibleError: As `budget_values`.
        """
        budget = budget_values(linears, keep)
        left = budget - sum(map(least_values, linears))
        pieces = [_pieces(linear, curves[linear.name]) for linear in linears]
        owners = np.repeat(np.arange(len(linears)), [len(costs) for costs, _ in pieces])
        costs = np.concatenate([costs for costs, _ in pieces])
        order = np.argsort(np.concatenate([rates for _, rates in pieces]), kind="stable")
        before = np.cumsum(costs[order]) - costs[order]
        bought = np.clip(left - before, 0, costs[order])
        values = np.bincount(owners[order], bought, minlength=len(linears)).astype(np.int64)
        assignments = {
            linear.name: _best(linear, curves[linear.name], least_values(linear) + int(more))
            for linear, more in zip(linears, values, strict=True)
        }
        return make_plan(linears, assignments, budget)


def _best(linear: Linear, surface: Surface, values: int) -> Assignment:
    """The form, rank and entries that lose least for so many values; of equals, entries alone."""
    if values == linear.values:
        return Assignment(form="dense")
    best = Assignment(form="sparse", nonzeros=values)
    least = surface.loss(0, values)
    for nonzeros, largest in surface.largest_ranks().items():
        rank = min((values - nonzeros) // linear.rank_cost, largest)
        if rank > 0 and (loss := surface.loss(rank, nonzeros)) < least:
            form: Form = "low_rank_sparse" if nonzeros else "low_rank"
            best, least = Assignment(form=form, rank=rank, nonzeros=nonzeros), loss
    return best


def _pieces(linear: Linear, surface: Surface) -> tuple[np.ndarray, np.ndarray]:
    """Values of each piece of the hull of the loss over stored values, and its values per gain.

    From the least that the linear stores to the dense weight.
    """
    least = least_values(linear)
    if least == linear.values:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    first = _best(linear, surface, least)
    stored_P = linear.factor_values(surface.ranks) + surface.nonzeros
    within_P = (stored_P > least) & (stored_P < linear.values)
    values = np.concatenate([[least], stored_P[within_P], [linear.values]])
    losses = np.concatenate(
        [[surface.loss(first.rank, first.nonzeros)], surface.losses[within_P], [0.0]]
    )
    order = np.lexsort((losses, values))
    # what loses more than something that stores less gains nothing
    gains = -np.diff(np.minimum.accumulate(losses[order]))
    costs = np.diff(values[order])
    return costs[costs > 0], hull_rates(costs[costs > 0], gains[costs > 0])
