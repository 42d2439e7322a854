"""Allocation of whole experts: shares of blocks, one ranking for the model, and its limits."""

import numpy as np
import pytest
from allocation import make_experts
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.experts.reap import ReapAllocator
from orchestrator.errors import InfeasibleError
from orchestrator.plan.forms import DROPPED
from orchestrator.plan.saliency import Saliency


def saliencies(linears, seed):
    drawn = iter(np.random.default_rng(seed).exponential(size=len(linears)).tolist())
    found = {}
    for linear in linears:
        expert = linear.name.rpartition(".")[0]
        mean = next(drawn) if linear.name.endswith("gate") else found[f"{expert}.gate"].mean
        found[linear.name] = Saliency(name=linear.name, mean=mean, tokens=9)
    return found


def kept_experts(plan, modules):
    """Return the numbers of the experts that stay, by module; all linears of one agree."""
    found = {}
    for module in modules:
        forms = [
            {plan.assignments[name].form for name in module.expert(number)}
            for number in range(module.count)
        ]
        assert all(len(each) == 1 for each in forms)
        found[module.name] = [n for n, each in enumerate(forms) if each == {"dense"}]
    return found


@given(seed=st.integers(0, 99), count=st.integers(3, 9), keep=st.floats(0.25, 1))
def test_shares_and_rankings(seed, count, keep):
    """`block` keeps the floor of each block's share, `model` at least as much saliency in all and
    as many experts in each block as its router chooses; both stay within the budget."""
    modules, linears = make_experts(3, count, choices=1)
    curves, budget = saliencies(linears, seed), Budget(round(keep, 3), DROPPED, experts=modules)
    share = budget.floor(count)
    if share < 1:
        with pytest.raises(InfeasibleError, match="its router chooses 1"):
            ReapAllocator()(linears, curves, budget, {})
        return
    sums = {}
    for scope in ("block", "model"):
        plan = ReapAllocator(scope=scope)(linears, curves, budget, {})
        assert plan.stored_values <= plan.budget_values
        kept = kept_experts(plan, modules)
        for name, numbers in kept.items():
            means = [curves[f"{name}.{n}.gate"].mean for n in range(count)]
            assert sorted(means)[count - len(numbers) :] == sorted(means[n] for n in numbers)
            assert len(numbers) == share if scope == "block" else len(numbers) >= 1
        sums[scope] = sum(
            curves[f"{name}.{n}.gate"].mean for name, numbers in kept.items() for n in numbers
        )
    assert sums["model"] >= sums["block"] - 1e-12


def test_the_router_must_find_its_experts():
    """Fewer than it chooses for a token are refused, with the least possible fraction."""
    modules, linears = make_experts(2, 4, choices=3)
    curves, budget = saliencies(linears, 0), Budget(0.5, DROPPED, experts=modules)
    for scope in ("block", "model"):
        with pytest.raises(InfeasibleError, match="choose"):
            ReapAllocator(scope=scope)(linears, curves, budget, {})
    plan = ReapAllocator()(linears, curves, Budget(0.75, DROPPED, experts=modules), {})
    assert all(len(each) == 3 for each in kept_experts(plan, modules).values())
