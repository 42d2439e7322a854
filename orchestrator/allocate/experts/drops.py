"""One threshold over linears and experts, of which some are dropped.

The loss of an expert as a function of its values starts at (0, loss without it) and goes on with
the merged steps of its linears, once each has its first one. On the lower convex hull of these
points the first segment, from 0 values to a first size, is one step: the expert is dropped if that
gains less per value than the threshold. The loss without an expert is the total of the curve of
`down`, whose outputs are then all lost; gate and up matter through them alone.

Indices: K steps of a linear, S steps of a chain, of a linear or of an expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.allocate.budget import Budget, make_plan, too_small
from orchestrator.allocate.steps import (
    Steps,
    cut_at,
    fill_steps,
    hull_rates,
    spend,
)
from orchestrator.errors import InfeasibleError, UsageError
from orchestrator.plan.forms import DROPPED
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.whole_experts import Expert, chosen_by_module, experts_by_module


@dataclass(frozen=True, slots=True)
class _Chain:
    """Steps of a linear, or of all linears of an expert."""

    places: tuple[int, ...]
    """Places of the linears among all."""
    owner_S: np.ndarray
    """Linear, of `places`, that a step belongs to; those of the first one are in `first`."""
    first: tuple[int, ...]
    """Steps of each linear in the first step of the chain."""
    cost_S: np.ndarray
    key_S: np.ndarray

    def counts(self, taken: int) -> list[int]:
        """Return the steps of each linear, of the first steps of the chain."""
        if not taken:
            return [0] * len(self.places)
        later = np.bincount(self.owner_S[1:taken], minlength=len(self.places))
        return [first + int(more) for first, more in zip(self.first, later, strict=True)]


def spend_dropping(
    linears: Sequence[Linear],
    curves: Mapping[str, Any],
    budget: Budget,
    *,
    steps: Sequence[Steps],
    ends: Sequence[np.ndarray | None],
) -> Plan:
    """Take steps by descending gain per value until the budget is spent; experts without any go.

    In each module as many experts stay as its router chooses for a token: those whose first
    segments gain most per value. A step that does not fit is passed over, and later ones that fit
    are taken, since that of an expert is large. The plan without dropping is taken if its loss is
    no larger, or if none is dropped.

    Cost: as `spend`, and a sort of each expert's steps.

    Args:
        steps: Steps of each linear; see `Threshold`.
        ends: See `spend`.

    Raises:
        InfeasibleError, UsageError: As `check_droppable`.
    """
    check_droppable(linears, budget)
    total, ranks = budget.share(linears), budget.ranks
    chains = _chains(linears, curves, budget, steps)
    taken = _take(chains, total)
    assignments = {}
    for chain, count in zip(chains, taken, strict=True):
        for place, of_linear in zip(chain.places, chain.counts(count), strict=True):
            linear = linears[place]
            if not count:
                assert len(chain.places) > 1, f"{linear.name} cannot be dropped"
                assignment = Assignment(form=DROPPED.name)
            elif of_linear == len(steps[place].cost_K):
                assignment = Assignment(form="dense")
            else:
                assignment = cut_at(linear, of_linear, ranks, ends[place], left=0)
            assignments[linear.name] = assignment
    found = make_plan(linears, assignments, total)
    whole = _without_dropping(linears, budget, steps=steps, ends=ends)
    if whole is None or (
        0 in taken
        and predicted_loss(linears, curves, found) < predicted_loss(linears, curves, whole)
    ):
        return found
    return whole


def check_droppable(linears: Sequence[Linear], budget: Budget) -> None:
    """Raise if no plan of the budget keeps every linear that is needed.

    Raises:
        UsageError: There are no experts; as `experts_by_module`.
        InfeasibleError: The smallest sizes of what cannot be dropped cost more than the budget.
    """
    modules, chosen = experts_by_module(linears, budget.experts), chosen_by_module(budget.experts)
    if not modules:
        raise UsageError(
            "threshold: drop is for experts, and no linear of any is targeted; leave it out"
        )
    inside = {each.name for experts in modules.values() for e in experts for each in e.linears}
    least = sum(budget.ranks.least_cost(each) for each in linears if each.name not in inside)
    for name, experts in modules.items():
        costs = [sum(map(budget.ranks.least_cost, expert.linears)) for expert in experts]
        least += sum(sorted(costs)[: chosen[name]])
    total = budget.share(linears)
    if total < least:
        what = "the smallest size of all that cannot be dropped"
        dense = sum(map(budget.cost.dense, linears))
        raise too_small(budget, total, dense, least=least, what=what)


def _chains(
    linears: Sequence[Linear],
    curves: Mapping[str, Any],
    budget: Budget,
    steps: Sequence[Steps],
) -> list[_Chain]:
    """Make the chains of all linears outside of experts and of all experts, in their order."""
    places = {linear.name: place for place, linear in enumerate(linears)}
    chains: dict[int, _Chain] = {}
    inside: set[int] = set()
    chosen = chosen_by_module(budget.experts)
    for name, experts in experts_by_module(linears, budget.experts).items():
        at = [tuple(places[each.name] for each in expert.linears) for expert in experts]
        made = [_chain_of(expert, p, curves, steps) for expert, p in zip(experts, at, strict=True)]
        order = sorted(range(len(made)), key=lambda each: made[each].key_S[0])
        needed = {*order[: chosen[name]]}
        for number, chain in enumerate(made):
            inside |= {*chain.places}
            if number not in needed:
                chains[chain.places[0]] = chain
            else:
                chains |= {place: _whole(place, steps[place]) for place in chain.places}
    outside = (place for place in range(len(linears)) if place not in inside)
    chains |= {place: _whole(place, steps[place]) for place in outside}
    return [chains[place] for place in sorted(chains)]


def _whole(place: int, found: Steps) -> _Chain:
    """Make the chain of a linear that cannot be dropped; its first step comes before others."""
    key_K = hull_rates(*found)
    key_K[0] = -np.inf
    return _Chain((place,), np.zeros(len(key_K), dtype=np.int64), (1,), found.cost_K, key_K)


def _chain_of(
    expert: Expert, places: tuple[int, ...], curves: Mapping[str, Any], steps: Sequence[Steps]
) -> _Chain:
    """Make the chain of an expert that may be dropped."""
    of_linears = [steps[place] for place in places]
    counts = [len(each.cost_K) - 1 for each in of_linears]
    keys = np.concatenate([hull_rates(*each)[1:] for each in of_linears])
    order_S = np.argsort(keys, kind="stable")
    owner_S = np.repeat(np.arange(len(places)), counts)[order_S]
    gains = np.concatenate([each.gain_K[1:] for each in of_linears])[order_S]
    costs = np.concatenate([each.cost_K[1:] for each in of_linears])[order_S]
    first_cost = sum(int(each.cost_K[0]) for each in of_linears)
    lost = sum(float(each.gain_K[1:].sum()) for each in of_linears)
    first_gain = float(curves[expert.linears[-1].name].total) - lost
    cost_S = np.concatenate([[first_cost], costs]).astype(np.int64)
    key_S = hull_rates(cost_S, np.concatenate([[first_gain], gains]))
    # a part of the first segment is above the hull
    joined = int(np.searchsorted(key_S, key_S[0], side="right"))
    inside = np.bincount(owner_S[: joined - 1], minlength=len(places))
    return _Chain(
        places=places,
        owner_S=np.concatenate([[0], owner_S[joined - 1 :]]),
        first=tuple(1 + int(more) for more in inside),
        cost_S=np.concatenate([[cost_S[:joined].sum()], cost_S[joined:]]),
        key_S=np.concatenate([key_S[:1], key_S[joined:]]),
    )


def _take(chains: Sequence[_Chain], total: int) -> list[int]:
    """Return the number of steps of each chain within the total, by ascending keys."""
    first = np.concatenate([[0], np.cumsum([len(chain.key_S) for chain in chains])])
    key = np.concatenate([chain.key_S for chain in chains])
    order = np.argsort(key, kind="stable")
    spent = np.cumsum(np.concatenate([chain.cost_S for chain in chains])[order])
    taken = int(np.searchsorted(spent, total, side="right"))
    left = total - (int(spent[taken - 1]) if taken else 0)
    is_taken = np.zeros(len(order), dtype=bool)
    is_taken[order[:taken]] = True
    steps = np.add.reduceat(is_taken, first[:-1], dtype=np.int64)
    fill_steps(steps, order, spent, first, left=left, wanted=len(order))
    found: list[int] = steps.tolist()
    return found


def _without_dropping(
    linears: Sequence[Linear],
    budget: Budget,
    *,
    steps: Sequence[Steps],
    ends: Sequence[np.ndarray | None],
) -> Plan | None:
    """Return the plan of the threshold without dropping; None if the budget has none."""
    total, keys = budget.share(linears), (hull_rates(*each) for each in steps)
    try:
        taken = spend(linears, keys, total, where="the model", ranks=budget.ranks, ends=ends)
    except InfeasibleError:
        return None
    return make_plan(linears, taken, total)


def predicted_loss(linears: Sequence[Linear], curves: Mapping[str, Any], plan: Plan) -> float:
    """Return the sum of the curves' losses at the sizes of a plan.

    The loss of a dense linear is 0, that of a dropped expert the total of `down`.
    """
    lost = 0.0
    for linear in linears:
        assigned = plan.assignments[linear.name]
        is_gone = assigned.form == DROPPED.name
        if assigned.form != "dense" and (not is_gone or linear.name.endswith(".down")):
            lost += curves[linear.name].loss(assigned.rank)
    return lost
