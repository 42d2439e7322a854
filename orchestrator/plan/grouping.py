"""Groups of linears that share one basis, as one joint linear that any allocator takes.

The linears of one role in n consecutive blocks stand on top of each other: [n m, k] outputs by
inputs, so rank r stores r (n m + k) values: n left factors [m, r] and one basis [r, k]. So do gates
and ups of the experts of a block. Their downs stand side by side: [m, n k], with one left factor
[m, r], an output basis, and n right factors [r, k]. Ranks, break-even and budget of a group are
those of the joint linear.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.errors import UsageError
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan

SHARED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears that Basis Sharing's authors group; o and down, whose inputs differ most, stay alone."""
DOWN = "down"
"""Linear of an expert whose outputs are in the residual stream, as those of all others."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Rule for sharing a basis: linears of the named kinds, in `size` blocks counted from 0, and
    linears of the experts of a block.

    A last group is shorter where the blocks do not divide. Linears whose shapes differ within a
    group, and all others, stay alone. Shard boundaries fall only between groups.
    """

    size: int = 1
    kinds: Collection[str] = ()
    """Last parts of the roles that are grouped, `q_proj`; the others stand alone."""
    experts: Sequence[Collection[str]] = ()
    """Linears of an expert, `gate`, that form a group with those of all experts of their block."""

    @property
    def is_shared(self) -> bool:
        """True if any linear may share a basis."""
        return self.size > 1 or bool(self.experts)

    def first(self, block: int) -> int:
        """The first block of the group of blocks that this one is in."""
        return block // self.size * self.size

    def joins(self, linear: Linear) -> bool:
        """True if the linear may share a basis with others."""
        if linear.experts:
            return any(linear.part in parts for parts in self.experts)
        return self.size > 1 and linear.role.rpartition(".")[2] in self.kinds

    def shares_outputs(self, linear: Linear) -> bool:
        """True if the linear may share an output basis."""
        return self.joins(linear) and is_wide([linear])

    def check(self, linears: Sequence[Linear], method: str) -> None:
        """Raise UsageError if the method shares bases, and none of these linears can have one."""
        if self.size > 1 and not any(map(self.joins, linears)):
            raise UsageError(
                f"{method}: group is {self.size}, but no targeted linear is named one of "
                f"{', '.join(self.kinds)}; give group 1"
            )
        if self.experts and not any(each.experts for each in linears):
            raise UsageError(
                f"{method}: no targeted linear is an expert's, so none share a basis; target "
                "experts, as *.experts.*, or give method two-sided"
            )

    def groups(self, linears: Sequence[Linear]) -> list[tuple[Linear, ...]]:
        """The linears, grouped, in the order of each group's first member."""
        groups: dict[tuple[object, ...], list[Linear]] = {}
        for linear in linears:
            key: tuple[object, ...] = (linear.name,)
            if self.joins(linear):
                shape = (linear.out_features, linear.in_features)
                key = (self.first(linear.block), self._kind(linear), shape)
            groups.setdefault(key, []).append(linear)
        return [tuple(group) for group in groups.values()]

    def _kind(self, linear: Linear) -> tuple[object, ...]:
        """The property that linears of a group have in common beside block and shape."""
        if not linear.experts:
            return (linear.role,)
        return linear.experts, *(parts for parts in self.experts if linear.part in parts)

    def stacked(self, linears: Sequence[Linear]) -> tuple[Linear, ...]:
        """The joint linear of each group, which has the name of the first member."""
        return tuple(stack(group) for group in self.groups(linears))

    def spread(self, linears: Sequence[Linear], plan: Plan) -> Plan:
        """Translate a plan for the joint linears into one for `linears`; all else stays the same.

        The first member of a group stores the basis, the others name it.
        """
        assignments: dict[str, Assignment] = {}
        for group in self.groups(linears):
            whole = plan.assignments[group[0].name]
            is_cut = whole.form != "dense"
            if is_cut and len(group) > 1 and is_wide(group):
                whole = replace(whole, form="output_basis")
            for linear in group:
                basis = group[0].name if is_cut and linear is not group[0] else whole.basis
                assignments[linear.name] = replace(whole, basis=basis)
        ordered = {linear.name: assignments[linear.name] for linear in linears}
        return replace(plan, assignments=ordered)


def is_wide(group: Sequence[Linear]) -> bool:
    """True if the linears of a group stand side by side and share the left factor."""
    return bool(group[0].experts) and group[0].part == DOWN


def stack(group: Sequence[Linear]) -> Linear:
    """The linears of a group as one, outputs on top of each other or inputs side by side."""
    if len(group) == 1:
        return group[0]
    if is_wide(group):
        return replace(group[0], in_features=sum(each.in_features for each in group))
    return replace(group[0], out_features=sum(each.out_features for each in group))


def gram_side(linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
    """Side of the Gram for a linear that needs only its left singular vectors.

    `output` if no linear of the site needs the Gram of the inputs and that of the outputs is
    smaller; otherwise `input`.
    """
    narrow = all(each.in_features > each.out_features for each in site)
    smaller = sum(each.out_features**2 for each in site) < linear.in_features**2
    return "output" if narrow and smaller else "input"
