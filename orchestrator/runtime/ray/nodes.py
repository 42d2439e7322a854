"""Nodes of a Ray cluster that can hold workers: names, free room, draining and quarantine."""

import time
from collections.abc import Callable, Set
from typing import Any

import ray

from orchestrator.runtime.ray.cluster import (
    WorkerResources,
    draining_nodes,
    free_room,
    node_names,
    total_room,
)

POLL_SECONDS = 2.0
"""Interval at which Ray is asked for the state of nodes; a query takes a few milliseconds."""
STARTING_POLL_SECONDS = 0.5
"""The same interval while workers start."""

Announce = Callable[[dict[str, Any]], None]


class RayNodes:
    """Nodes of the cluster. Callers of a pool see names, Ray's own functions take ids.

    Args:
        resources: Resources of one worker, by which room on a node is counted.
        announce: Called with an event for each node that starts to drain.
        is_growing: Whether an autoscaler may add nodes for this pool.
    """

    def __init__(self, resources: WorkerResources, announce: Announce, *, is_growing: bool) -> None:
        self._resources, self._announce = resources, announce
        self._is_growing = is_growing
        self._names: dict[str, str] = {}
        self._draining: set[str] = set()
        self._excluded: set[str] = set()
        self._polled = 0.0
        self.is_starting = True
        """True if workers start, so that nodes are polled more often."""
        self.free = 0
        """Workers for which nodes that stay have free resources; the pool counts its own down."""

    @property
    def is_growing(self) -> bool:
        return self._is_growing

    def poll(self) -> None:
        """Update free room and draining nodes, unless they have been updated recently."""
        pause = STARTING_POLL_SECONDS if self.is_starting else POLL_SECONDS
        if time.monotonic() - self._polled < pause:
            return
        self._polled = time.monotonic()
        for node, deadline in draining_nodes().items():
            if node not in self._draining:
                self._draining.add(node)
                event = {"event": "draining", "node": self.name(node), "deadline": deadline}
                self._announce(event)
        free = free_room(self._resources)
        self.free = sum(room for node, room in free.items() if self.stays(node))

    def name(self, node_id: str) -> str:
        if node_id not in self._names:
            self._names |= node_names()
        return self._names[node_id]

    def stays(self, node_id: str) -> bool:
        """True if the node is neither draining nor quarantined."""
        return node_id not in self._draining and node_id not in self._excluded

    def is_draining(self, node_id: str) -> bool:
        return node_id in self._draining

    def is_quarantined(self, node_id: str) -> bool:
        return node_id in self._excluded

    @property
    def excluded_ids(self) -> Set[str]:
        """Ids of the quarantined nodes."""
        return self._excluded

    def room(self) -> int:
        """Workers that the nodes that stay can hold, whatever runs there now."""
        return sum(room for node, room in total_room(self._resources).items() if self.stays(node))

    def available(self) -> Set[str]:
        return {self.name(node) for node in total_room(self._resources) if self.stays(node)}

    def leaving(self) -> Set[str]:
        self.poll()
        return {self.name(node) for node in self._draining | self._excluded}

    def quarantined(self) -> Set[str]:
        return {self.name(node) for node in self._excluded}

    def quarantine(self, node: str) -> None:
        self._excluded |= {each for each, name in self._names.items() if name == node}

    def describe(self) -> str:
        free, there = ray.available_resources(), ray.cluster_resources()
        amounts = [
            f"{free.get(name, 0):g} of {there[name]:g} {name} free"
            for name in ("CPU", "GPU")
            if name in there
        ]
        going = [f"{self.name(node)} is draining" for node in sorted(self._draining)]
        going += [f"{name} is quarantined" for name in sorted(self.quarantined())]
        return ", ".join([*amounts, *going])
