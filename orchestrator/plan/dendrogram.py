"""Hierarchical clustering of items by their distances, with average linkage.

Indices: E items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Merge:
    """Two clusters that become one, each named by its smallest item."""

    first: int
    """The smaller name, which the new cluster keeps."""
    second: int
    distance: float
    """Mean distance of the items of one cluster from those of the other."""


def average_linkage(distances_EE: np.ndarray) -> tuple[Merge, ...]:
    """Merge the two clusters with the smallest mean distance of their items, until one is left.

    Of equal distances that of the smallest names goes first, so that the result is a function of
    the distances alone. Distances of merges never fall. O(E³) in E vector operations.

    Args:
        distances_EE: Symmetric; the diagonal is not read.

    Returns:
        E - 1 merges in their order.
    """
    count = len(distances_EE)
    between_EE = np.array(distances_EE, dtype=np.float64)
    np.fill_diagonal(between_EE, np.inf)
    sizes_E = np.ones(count)
    merges = []
    for _ in range(count - 1):
        first, second = sorted(divmod(int(np.argmin(between_EE)), count))
        merges.append(Merge(first, second, float(between_EE[first, second])))
        one, other = sizes_E[first], sizes_E[second]
        joint_E = (one * between_EE[first] + other * between_EE[second]) / (one + other)
        joint_E[first] = np.inf
        between_EE[first, :] = between_EE[:, first] = joint_E
        between_EE[second, :] = between_EE[:, second] = np.inf
        sizes_E[first] += other
    return tuple(merges)


def clusters(merges: Sequence[Merge], count: int) -> tuple[tuple[int, ...], ...]:
    """Return the clusters that are left when there are `count` of them, by their smallest items.

    Args:
        merges: Result of `average_linkage`.
        count: From 1 to the number of items.
    """
    members = {item: [item] for item in range(len(merges) + 1)}
    for merge in merges[: len(merges) + 1 - count]:
        members[merge.first] += members.pop(merge.second)
    return tuple(tuple(sorted(each)) for each in members.values())
