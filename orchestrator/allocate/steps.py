"""A linear as a chain of steps, and the steps that a budget buys.

A linear of break-even rank b has b steps: one for each rank below b, and a last one that makes it
dense, at the price of what the dense weight stores more. Where b is 0 or 1 its only step is the
dense weight. Every rank costs the same, pivoted each one less than the one before. Of a curve that
is known at some ranks alone (`Knots`) a step takes all ranks up to the next of these. An allocator
says in which order steps are worth taking; `spend` takes them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from orchestrator.errors import InfeasibleError
from orchestrator.plan.forms import LOW_RANK, Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment


def step_costs(
    linear: Linear, ranks: np.ndarray | None = None, form: Form = LOW_RANK
) -> np.ndarray:
    """Stored values that each step adds, int64 [steps]; they sum to the dense weight's values.

    Args:
        ranks: Those that steps end at, ascending, the dense one's left out; else every rank.
    """
    ends = np.arange(1, form.break_even(linear)) if ranks is None else ranks
    stored = np.zeros(len(ends) + 2, dtype=np.int64)
    stored[1:-1] = form.factor_values(linear, ends.astype(np.int64))
    stored[-1] = linear.values
    costs: np.ndarray = stored[1:] - stored[:-1]
    return costs


def spend(
    linears: Sequence[Linear],
    keys: Iterable[np.ndarray],
    budget: int,
    *,
    where: str,
    ranks: Sequence[np.ndarray | None] | None = None,
    form: Form = LOW_RANK,
) -> dict[str, Assignment]:
    """Takes steps in ascending order of their keys until the next one does not fit.

    `keys[i]` is float64 [steps of linear i] and never descends. Every linear's first step comes
    before all others, whatever its key; equal keys go in the order of the linears; a step with an
    infinite key is never taken. What is left is less than the next step's cost, and stays unused:
    no cheaper step is taken out of turn. So what a smaller budget buys with the same keys is part
    of what a larger one buys, and with keys that are costs per gain no plan that stores as little
    gains more. Of a step of several ranks as many are taken as fit.

    O(n log n) in the number of steps, and some 40 bytes for each.

    Args:
        keys: One after the other; nothing of them is kept but the numbers.
        ranks: Of each linear those that its steps end at, as `step_costs` has it.

    Raises:
        InfeasibleError: The first steps alone cost more, with `where` in the message.
    """
    ends = [None] * len(linears) if ranks is None else ranks
    costs = [step_costs(linear, end, form) for linear, end in zip(linears, ends, strict=True)]
    counts = np.array([len(cost) for cost in costs])
    first = np.concatenate([[0], np.cumsum(counts)])
    all_costs = np.concatenate(costs)
    del costs
    all_keys = _join(keys, counts, first)
    order = np.argsort(all_keys, kind="stable")
    wanted = int(np.count_nonzero(all_keys < np.inf))
    del all_keys
    spent = all_costs[order]
    del all_costs
    np.cumsum(spent, out=spent)
    least = int(spent[len(linears) - 1])
    if least > budget:
        raise InfeasibleError(
            f"{where}: a share of {budget} values is below rank 1 for each of {len(linears)} "
            f"linears, which stores {least}; keep more, or leave some out with --ignore"
        )
    taken = min(int(np.searchsorted(spent, budget, side="right")), wanted)
    left = budget - int(spent[taken - 1])
    is_taken = np.zeros(len(order), dtype=bool)
    is_taken[order[:taken]] = True
    steps = np.add.reduceat(is_taken, first[:-1], dtype=np.int64)
    following = int(np.searchsorted(first, order[taken], "right")) - 1 if taken < wanted else -1
    assignments = {}
    for place, (linear, end, count) in enumerate(zip(linears, ends, steps.tolist(), strict=True)):
        if count == counts[place]:
            assignments[linear.name] = Assignment(form="dense")
            continue
        rank = count if end is None else int(end[count - 1])
        if end is not None and place == following and count < len(end):
            rank = form.rank_within(linear, form.factor_values(linear, rank) + left)
        assignments[linear.name] = Assignment(form=form.name, rank=rank)
    return assignments


def _join(keys: Iterable[np.ndarray], counts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The keys of all linears one after the other; those of first steps come before all others."""
    all_keys = np.empty(first[-1])
    for start, count, key in zip(first, counts, keys, strict=False):
        assert key.shape == (count,)
        assert np.all(key[1:] >= key[:-1]), "a step must not come before those it builds on"
        all_keys[start : start + count] = key
    all_keys[first[:-1]] = -np.inf
    return all_keys
