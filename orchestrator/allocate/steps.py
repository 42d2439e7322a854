"""A linear as a chain of steps, and the steps that a budget buys.

A linear of break-even rank b has b steps: one for each rank below b, and a last one that makes it
dense, at the price of what the dense weight stores more. Where b is 0 or 1 its only step is the
dense weight. Every rank costs the same, pivoted each one less than the one before. An allocator
says in which order steps are worth taking; `spend` takes them.
"""

from collections.abc import Sequence

import numpy as np

from orchestrator.errors import InfeasibleError
from orchestrator.plan import Assignment, Linear


def step_costs(linear: Linear) -> np.ndarray:
    """Stored values that each step adds, int64 [steps]; they sum to the dense weight's values."""
    ranks = np.arange(max(linear.break_even, 1), dtype=np.int64)
    return np.diff(linear.factor_values(ranks), append=linear.values)


def spend(
    linears: Sequence[Linear], keys: Sequence[np.ndarray], budget: int, *, where: str
) -> dict[str, Assignment]:
    """Takes steps in ascending order of their keys until the next one does not fit.

    `keys[i]` is float64 [steps of linear i] and never descends. Every linear's first step comes
    before all others, whatever its key; equal keys go in the order of the linears; a step with an
    infinite key is never taken. What is left is less than the next step's cost, and stays unused:
    no cheaper step is taken out of turn. So what a smaller budget buys with the same keys is part
    of what a larger one buys, and with keys that are costs per gain no plan that stores as little
    gains more.

    O(n log n) in the number of steps.

    Raises:
        InfeasibleError: The first steps alone cost more, with `where` in the message.
    """
    costs = [step_costs(linear) for linear in linears]
    order_keys = []
    for cost, key in zip(costs, keys, strict=True):
        assert key.shape == cost.shape
        assert np.all(key[1:] >= key[:-1]), "a step must not come before those it builds on"
        order_keys.append(np.concatenate([[-np.inf], key[1:]]))
    all_keys = np.concatenate(order_keys)
    order = np.argsort(all_keys, kind="stable")
    spent = np.cumsum(np.concatenate(costs)[order])
    least = int(spent[len(linears) - 1])
    if least > budget:
        raise InfeasibleError(
            f"{where}: a share of {budget} values is below rank 1 for each of {len(linears)} "
            f"linears, which stores {least}; keep more, or leave some out with --ignore"
        )
    taken = min(np.searchsorted(spent, budget, side="right"), np.sum(all_keys < np.inf))
    owners = np.repeat(np.arange(len(linears)), [len(cost) for cost in costs])
    counts = np.bincount(owners[order[:taken]], minlength=len(linears))
    return {
        linear.name: Assignment(form="dense")
        if count == len(cost)
        else Assignment(form=linear.factored, rank=int(count))
        for linear, cost, count in zip(linears, costs, counts, strict=True)
    }
