"""Allocation of ranks and entries under one budget, by measured losses of both together.

Indices: P points of a linear, ordered by entries, then by rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.steps import hull_rates
from orchestrator.plan.forms import Divided, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.surface import Surface


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSparseAllocator(Allocator):
    """Minimises the summed loss over entries and rank of every linear, under one budget.

    For each linear, the lower convex hull of the measured losses over stored values (n entries and
    r (m + n) values of factors, with the dense weight as the last corner) is a chain of segments
    with falling gain per value. The segments of all linears are taken in that order; the first one
    that does not fit is taken partially. Each linear then gets the best assignment for its values:
    entries alone, or factors with one of the measured numbers of entries. The plan is optimal among
    the measured points for every budget that ends at a corner; only the last linear may leave
    values unused, less than its segment.

    Laws: those of `orchestrator.allocate` for the stored values of a linear instead of its rank,
    which may fall when entries replace it. The minimum of a linear is the values of rank 1, used
    for that rank or for as many entries.

    O(P log P) in the points of all linears. For results of method `two-sided-sparse`.
    """

    divides: ClassVar[tuple[Divided, ...]] = ("ranks and entries together",)

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Any],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget; `curves` are `Surface`s.

        Raises:
            InfeasibleError: As `Budget.total`.
        """
        total, form = budget.total(linears), budget.form
        left = total - sum(map(form.least_values, linears))
        segments = [_segments(linear, curves[linear.name], form) for linear in linears]
        owners = np.repeat(np.arange(len(linears)), [len(costs) for costs, _ in segments])
        costs = np.concatenate([costs for costs, _ in segments])
        order = np.argsort(np.concatenate([rates for _, rates in segments]), kind="stable")
        before = np.cumsum(costs[order]) - costs[order]
        bought = np.clip(left - before, 0, costs[order])
        values = np.bincount(owners[order], bought, minlength=len(linears)).astype(np.int64)
        assignments = {
            linear.name: _best(linear, curves[linear.name], form.least_values(linear) + int(more))
            for linear, more in zip(linears, values, strict=True)
        }
        return make_plan(linears, assignments, total)


def _best(linear: Linear, surface: Surface, values: int) -> Assignment:
    """Return the form, rank and entries with the least loss for this number of values; ties:
    entries alone."""
    if values == linear.values:
        return Assignment(form="dense")
    best = Assignment(form="sparse", nonzeros=values)
    least = surface.loss(0, values)
    for nonzeros, largest in surface.largest_ranks().items():
        rank = min((values - nonzeros) // linear.rank_cost, largest)
        if rank > 0 and (loss := surface.loss(rank, nonzeros)) < least:
            form = "low_rank_sparse" if nonzeros else "low_rank"
            best, least = Assignment(form=form, rank=rank, nonzeros=nonzeros), loss
    return best


def _segments(linear: Linear, surface: Surface, form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Return the values and the values per gain of each segment of the hull of the loss.

    From the fewest values of the linear to the dense weight.
    """
    least = form.least_values(linear)
    if least == linear.values:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    first = _best(linear, surface, least)
    stored_P = form.factor_values(linear, surface.ranks) + surface.nonzeros
    within_P = (stored_P > least) & (stored_P < linear.values)
    values = np.concatenate([[least], stored_P[within_P], [linear.values]])
    losses = np.concatenate(
        [[surface.loss(first.rank, first.nonzeros)], surface.losses[within_P], [0.0]]
    )
    order = np.lexsort((losses, values))
    # a point with more values and a larger loss than another one has no gain
    gains = -np.diff(np.minimum.accumulate(losses[order]))
    costs = np.diff(values[order])
    return costs[costs > 0], hull_rates(costs[costs > 0], gains[costs > 0])
