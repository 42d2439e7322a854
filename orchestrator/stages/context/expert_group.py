"""Group of experts: those of every block whose statistics are gathered in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.plan.experts import expert_groups, module_of_experts
from orchestrator.plan.grouping import Grouping
from orchestrator.plan.linear import Linear
from orchestrator.store.units import unit_key

EXPERT_GROUP_VERSION = 1
"""Raised when the content of a group's unit changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroup:
    """One of several groups of experts, gathered one after the other by passes of their own.

    A pass but the last leaves a unit for every block with experts: the results of its experts, the
    statistics of those that need the sums over all experts of the block, and these sums so far. The
    last pass joins them to the unit that a single pass would have committed, to the bit; linears
    that are no expert's go with the first group, blocks without experts with the last.
    """

    place: int = 0
    count: int = 1
    """Number of groups."""
    modules: frozenset[str] = frozenset()
    """Names of the modules of experts."""

    @property
    def is_last(self) -> bool:
        return self.place == self.count - 1

    def has_experts(self, linears: Sequence[Linear]) -> bool:
        """Return True if some of these linears are an expert's."""
        return any(module_of_experts(each) in self.modules for each in linears)

    def linears(self, linears: Sequence[Linear], grouping: Grouping) -> list[Linear]:
        """Return the linears of this group."""
        units: dict[int, list[Linear]] = {}
        for linear in linears:
            units.setdefault(grouping.first(linear.block), []).append(linear)
        found: list[Linear] = []
        for each in units.values():
            if self.has_experts(each):
                found += expert_groups(each, self.modules, self.count)[self.place]
            elif self.is_last:
                found += each
        return found

    def key(self, block_key: str, place: int | None = None) -> str:
        """Return the key of the unit that a group's pass commits: for the last, that of the block.

        Args:
            place: Place of another group; None: this one.
        """
        place = self.place if place is None else place
        if place == self.count - 1:
            return block_key
        about = {"group": place, "groups": self.count}
        return unit_key("expert-group", EXPERT_GROUP_VERSION, [block_key], **about)

    def keys(
        self, block_keys: Mapping[int, str], linears: Sequence[Linear], grouping: Grouping
    ) -> dict[int, str]:
        """Return the keys of the units of this group's pass, by the first block of each."""
        chosen: dict[int, list[Linear]] = {}
        for linear in linears:
            chosen.setdefault(grouping.first(linear.block), []).append(linear)
        return {
            block: self.key(key)
            for block, key in block_keys.items()
            if self.is_last or self.has_experts(chosen[block])
        }


WHOLE = ExpertGroup()
"""The group of all experts, of a single pass."""
