"""Allocation of clusters of experts: the most similar experts of a block become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.errors import InfeasibleError
from orchestrator.plan.dendrogram import Merge, average_linkage, clusters
from orchestrator.plan.expert_distances import ExpertDistances
from orchestrator.plan.forms import Divided
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.whole_experts import Expert, experts_by_module


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeExpertsAllocator(Allocator):
    """The same number of clusters in every block, floor(keep E) of E experts, by average linkage.

    What is left of the budget undoes the last merge of blocks, that of the largest distance first,
    at most one in each. The first expert of a cluster stores its weights; an expert alone stays
    dense.
    """

    source: ClassVar[str] = "arXiv 2410.08589"
    divides: ClassVar[tuple[Divided, ...]] = ("clusters",)

    @property
    def is_even(self) -> bool:
        return True

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Any],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: A block would have no expert.
            UsageError: As `experts_by_module`.
        """
        self.check_budget(linears, budget)
        blocks = experts_by_module(linears, budget.experts)
        merges = {name: _merges(experts, curves) for name, experts in blocks.items()}
        counts = {name: budget.floor(len(experts)) for name, experts in blocks.items()}
        left = budget.total(linears) - sum(
            counts[name] * experts[0].values for name, experts in blocks.items()
        )

        def last_distance(name: str) -> float:
            return merges[name][len(blocks[name]) - counts[name] - 1].distance

        merged = [name for name, experts in blocks.items() if counts[name] < len(experts)]
        for name in sorted(merged, key=last_distance, reverse=True):
            if blocks[name][0].values > left:
                break
            left -= blocks[name][0].values
            counts[name] += 1
        assignments = dict.fromkeys((each.name for each in linears), Assignment(form="dense"))
        for name, experts in blocks.items():
            for cluster in clusters(merges[name], counts[name]):
                if len(cluster) > 1:
                    assignments |= _tied([experts[each] for each in cluster], budget.form.name)
        return make_plan(linears, assignments, budget.total(linears))

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise InfeasibleError if the share of a block is below one expert."""
        for name, experts in experts_by_module(linears, budget.experts).items():
            if budget.floor(len(experts)) < 1:
                raise InfeasibleError(
                    f"keep: {budget.kept} of the {len(experts)} experts of {name} is none; "
                    f"the least possible is {1 / len(experts):.6f}"
                )


def _merges(experts: Sequence[Expert], curves: Mapping[str, ExpertDistances]) -> tuple[Merge, ...]:
    """Return the merges of the experts of a block."""
    rows = [curves[expert.linears[-1].name].distances for expert in experts]
    return average_linkage(np.array(rows))


def _tied(cluster: Sequence[Expert], form: str) -> dict[str, Assignment]:
    """Assign the weights of the first expert of a cluster to the linears of all of them."""
    first, *others = cluster
    assignments = {linear.name: Assignment(form=form) for linear in first.linears}
    for expert in others:
        for linear, basis in zip(expert.linears, first.linears, strict=True):
            assignments[linear.name] = Assignment(form=form, basis=basis.name)
    return assignments
