"""Hierarchical clustering: order of merges, distances of clusters, nesting."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.dendrogram import average_linkage, clusters


def distances_of(rows):
    return np.linalg.norm(rows[:, None] - rows[None], axis=-1)


def merges_by_definition(distances):
    """Merge the pair with the least mean distance of members, searched among all pairs."""
    groups, found = [(item,) for item in range(len(distances))], []
    while len(groups) > 1:
        mean, one, two = min(
            (np.mean([distances[i, j] for i in one for j in two]), one, two)
            for one, two in itertools.combinations(groups, 2)
        )
        found.append((one[0], two[0], mean))
        groups = sorted([*(g for g in groups if g not in (one, two)), tuple(sorted(one + two))])
    return found


@given(items=st.integers(2, 6), seed=st.integers(0, 1000))
def test_merges_are_those_of_a_search_among_all_pairs(items, seed):
    """Clusters, order and distances agree with mean distances computed from the items."""
    distances = distances_of(np.random.default_rng(seed).normal(size=(items, 3)))
    found = [(each.first, each.second, each.distance) for each in average_linkage(distances)]
    expected = merges_by_definition(distances)
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    assert [each[2] for each in found] == pytest.approx([each[2] for each in expected])


@given(items=st.integers(1, 8), seed=st.integers(0, 1000))
def test_clusters_are_nested_partitions(items, seed):
    """Each item is in one of the clusters of every number, and one fewer joins exactly two."""
    merges = average_linkage(distances_of(np.random.default_rng(seed).normal(size=(items, 3))))
    assert all(a.distance <= b.distance + 1e-12 for a, b in itertools.pairwise(merges))
    finer = clusters(merges, items)
    assert finer == tuple((item,) for item in range(items))
    for count in range(items - 1, 0, -1):
        coarser = clusters(merges, count)
        assert len(coarser) == count
        assert sorted(itertools.chain(*coarser)) == [*range(items)]
        assert len({*coarser} - {*finer}) == 1
        finer = coarser


def test_equal_distances_merge_the_first_items_first():
    """The result depends on the distances alone, not on an order of evaluation."""
    merges = average_linkage(np.ones((4, 4)))
    assert [(each.first, each.second) for each in merges] == [(0, 1), (0, 2), (0, 3)]
