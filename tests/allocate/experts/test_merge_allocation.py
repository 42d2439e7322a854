"""Allocation of clusters of experts: shares of blocks, what is left, and limits."""

import numpy as np
import pytest
from allocation import make_experts
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.allocate.budget import Budget
from orchestrator.allocate.experts.merge_experts import MergeExpertsAllocator
from orchestrator.errors import InfeasibleError
from orchestrator.plan.dendrogram import average_linkage, clusters
from orchestrator.plan.expert_distances import ExpertDistances
from orchestrator.plan.forms import TIED


def drawn(modules, seed):
    """Distances of random points, one for each expert, by linear."""
    generator, found = np.random.default_rng(seed), {}
    for module in modules:
        points = generator.normal(size=(module.count, 3)) * generator.uniform(0.1, 10)
        for number in range(module.count):
            apart = tuple(np.linalg.norm(points - points[number], axis=1).tolist())
            for name in module.expert(number):
                distances = apart if name.endswith("down") else ()
                found[name] = ExpertDistances(name=name, tokens=5, distances=distances)
    return found


def clusters_of(plan, module):
    """Clusters of a module's experts by the plan, the same for all linears of an expert."""
    found = {}
    for number in range(module.count):
        firsts = {plan.assignments[name].basis or name for name in module.expert(number)}
        (first,) = {int(name.split(".")[-2]) for name in firsts}
        found.setdefault(first, []).append(number)
    return tuple(map(tuple, found.values()))


@given(seed=st.integers(0, 99), count=st.integers(2, 7), keep=st.floats(0.2, 1))
def test_every_block_has_its_share_and_at_most_one_more(seed, count, keep):
    """Clusters are those of the dendrogram; what is left is less than an expert, or all blocks have
    one more; an expert alone is dense."""
    modules, linears = make_experts(3, count)
    curves = drawn(modules, seed)
    budget = Budget(round(keep, 3), TIED, experts=modules)
    share = budget.floor(count)
    if share < 1:
        with pytest.raises(InfeasibleError, match="is none; the least possible is"):
            MergeExpertsAllocator()(linears, curves, budget, {})
        return
    plan = MergeExpertsAllocator()(linears, curves, budget, {})
    expert, lasts = sum(each.values for each in linears[:3]), {}
    for module in modules:
        rows = [curves[f"{module.name}.{e}.down"].distances for e in range(count)]
        merges, found = average_linkage(np.array(rows)), clusters_of(plan, module)
        assert found == clusters(merges, len(found))
        assert len(found) - share in (0, 1)
        lasts[module.name] = len(found) - share, merges[count - share - 1 if share < count else -1]
        for cluster in found:
            forms = {plan.assignments[name].form for e in cluster for name in module.expert(e)}
            assert forms == ({"tied"} if len(cluster) > 1 else {"dense"})
    assert plan.stored_values == expert * sum(len(clusters_of(plan, each)) for each in modules)
    more = [last.distance for added, last in lasts.values() if added]
    less = [last.distance for added, last in lasts.values() if not added]
    assert plan.slack_values < expert or not less or share == count
    assert not more or not less or min(more) >= max(less)
