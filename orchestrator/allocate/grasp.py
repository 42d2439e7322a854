"""GRASP: the blocks that change the residual stream least are cut alone (arXiv 2501.00339).

Indices: K steps of a linear, N numbers of blocks from 0 on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.mgaa import captured
from orchestrator.allocate.steps import spend, step_costs
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.cost import VALUES
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Plan
from orchestrator.recipe.options import check_choice, check_number, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class GraspAllocator(Allocator):
    """Cuts the linears of the blocks of least influence; those of all other blocks stay dense.

    The influence of block l is the mean over calibration tokens of 1 − cos(h_l, h_l+1), h_l its
    input in the residual stream. What the budget leaves beside the dense blocks is divided over the
    redundant ones: every linear keeps the same fraction of its values (`values`), or the fewest
    directions with the same share of the sum of its curve (`importance`, the published
    `threshold_ratio`); the largest fraction within the budget.

    Published are 8 of 32 blocks with 0.3 of their values, 0.825 of all. By default (`blocks` 0)
    the number of blocks follows from the budget: as few as keep at least `least` of their values
    together, which gives these 8 at 0.825; all blocks for a budget below `least`. Then a rank may
    fall as the budget grows, where one block fewer is cut. With a number of blocks none falls.

    Departures from the authors' code: the mean is over all tokens, where theirs is a sum of means
    over batches, a common factor for windows of equal length; an undefined cosine counts as 0.5, as
    theirs; the contiguous run by the angle of last tokens (`angular`) is not offered.
    """

    source: ClassVar[str] = "arXiv 2501.00339"
    departure: ClassVar[str] = (
        "The number of blocks follows from the budget unless `grasp.blocks` fixes it; blocks are "
        "not chosen by the angle of last tokens."
    )
    use: ClassVar[str] = (
        "To cut few redundant blocks deeply, with the directions of any low-rank method. "
        "`threshold` over all blocks lost far less in our results."
    )
    needs_block_cosines: ClassVar[bool] = True

    blocks: int = 0
    """Number of blocks that are cut; 0: as the budget asks, by `least`."""
    least: float = 0.3
    """Fraction of their values that the blocks keep at least, where their number is free."""
    cut: Literal["values", "importance"] = "values"
    """Fraction that all linears of the redundant blocks keep alike."""

    def __post_init__(self) -> None:
        check_whole("grasp: blocks", self.blocks, 0, 10**6)
        check_number("grasp: least", self.least, 0, 1)
        check_choice("grasp: cut", self.cut, ("values", "importance"))

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: As `Budget.total`; also if rank 1 in every linear of `blocks` blocks,
                with the others dense, stores more.
            InputError: The cosine of a block is missing or not finite.
            UsageError: There are fewer blocks than `blocks`.
        """
        total, ranks = budget.total(linears), budget.ranks
        influences = influences_of(linears, cosines)
        redundant = self._redundant(linears, sorted(influences, key=influences.__getitem__), budget)
        # equal fractions are taken in this order, which is not that of the blocks' numbers
        ordered = sorted(linears, key=lambda each: -influences[each.block])
        keys = (
            self._keys(linear, curves[linear.name], ranks)
            if linear.block in redundant
            else np.full(len(step_costs(linear, ranks)), -1.0)
            for linear in ordered
        )
        taken = spend(ordered, keys, total, where="the model", ranks=ranks)
        return make_plan(linears, taken, total)

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Raise the errors of a call that no cosine prevents: as if the largest blocks were the
        redundant ones."""
        budget.total(linears)
        if budget.cost is not VALUES:
            return
        size = dict.fromkeys((each.block for each in linears), 0)
        for linear in linears:
            size[linear.block] -= linear.values
        self._redundant(linears, sorted(size, key=size.__getitem__), budget)

    def facts(
        self, linears: Sequence[Linear], cosines: Mapping[str, float], plan: Plan
    ) -> dict[str, Any]:
        """Return `redundancy`: the influence of every block, and the blocks that are cut."""
        forms = plan.assignments
        found = influences_of(linears, cosines)
        cut = sorted({each.block for each in linears if forms[each.name].form != "dense"})
        influences = {f"{block}": influence for block, influence in found.items()}
        return {"redundancy": {"influences": influences, "cut_blocks": cut}}

    def _redundant(
        self, linears: Sequence[Linear], blocks: Sequence[int], budget: Budget
    ) -> set[int]:
        """Return the redundant ones of blocks by ascending influence."""
        if self.blocks > len(blocks):
            raise UsageError(
                f"grasp: blocks is {self.blocks}, but the targeted linears are in {len(blocks)} "
                f"blocks; give at most {len(blocks)}, or 0"
            )
        total, ranks = budget.total(linears), budget.ranks
        dense, least = (dict.fromkeys(blocks, 0) for _ in range(2))
        for linear in linears:
            dense[linear.block] += linear.values
            least[linear.block] += ranks.least_cost(linear)
        values_N, smallest_N = (
            np.concatenate([[0], np.cumsum([*each.values()])]) for each in (dense, least)
        )
        left_N = total - (values_N[-1] - values_N)
        asked = Fraction(str(self.least))
        asked_N = np.array([math.floor(asked * int(values)) for values in values_N])
        enough = np.flatnonzero(left_N >= np.maximum(smallest_N, asked_N))
        count = self.blocks or int(enough[0] if len(enough) else len(blocks))
        if left_N[count] < smallest_N[count]:
            raise InfeasibleError(
                f"grasp: {count} blocks are cut and the others dense, which leaves "
                f"{left_N[count]} of {total} values for these; {ranks.smallest} in each of their "
                f"linears stores {smallest_N[count]}; keep more, raise grasp.blocks, or give "
                "allocation threshold"
            )
        return set(blocks[:count])

    def _keys(self, linear: Linear, curve: Curve, ranks: AllowedRanks) -> np.ndarray:
        """Return the fraction that is kept with each step, or captured before it, ascending."""
        if self.cut == "importance":
            return captured(linear, curve, ranks)
        fraction_K: np.ndarray = np.cumsum(step_costs(linear, ranks)) / linear.values
        return fraction_K


def influences_of(linears: Iterable[Linear], cosines: Mapping[str, float]) -> dict[int, float]:
    """Return the influence of every block with a targeted linear, in the order of the blocks.

    Raises:
        InputError: The cosine of one is missing or not finite.
    """
    influences = {}
    for block in sorted({linear.block for linear in linears}):
        cosine = cosines.get(f"{block}", math.nan)
        if not math.isfinite(cosine):
            raise InputError(
                f"block {block}: the cosine of its input and output is "
                f"{cosines.get(f'{block}', 'missing')}; grasp needs a finite one for every block; "
                "calibrate again, in another run directory, or give another allocation"
            )
        influences[block] = 1 - cosine
    return influences
