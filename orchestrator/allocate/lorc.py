"""LoRC: fewer ranks for keys and values of deep blocks, by cumulative condition numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan, plan_cost
from orchestrator.errors import InputError
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_number

SMALLEST = 1e-4
"""Singular value, as a fraction of the largest, below which the smallest one is taken for this: in
16-bit weights it is rounding noise."""
STEPS = 10**6
"""Steps of each of the two parts of the bisection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lorc(Allocator):
    """Ranks of k_proj and v_proj that fall with depth, as LoRC's progressive compression.

    With κ(W) = σ_max / σ_min of the targeted linears of a block, K and V of LoRC, the cumulative
    condition number of block l is that of all blocks from it on,

        κ̃_l = Π_{j >= l} κ(W_K^j) κ(W_V^j),

    which falls with depth, since κ >= 1. A rank is a share of the width min(O, I):

        d_l = d_max (1 - t_l (1 - d_min / d_max)),
        t_l = (max log κ̃ - log κ̃_l) / (max log κ̃ - min log κ̃),

    so that the first block gets d_max, the last one d_min, and blocks of equal κ̃ equal ranks; all
    of them d_min if all are equal. Ranks are rounded down to allowed ones; a share of 1 is dense,
    and one between the largest allowed rank and 1 gets that rank. What rounding leaves is slack.

    The formula of d_l is a reconstruction: a digest of the paper states the product and that
    shallow blocks keep more, and neither d_max nor d_min was found. Departures:

    1. d_min is the largest that the budget allows, by bisection. Where even the smallest d_min
       costs more, d_min stays there and d_max falls.
    2. σ_min is at least 1e-4 σ_max.
    3. Any cost can be the budget: values, or the cache (`--keep-cache`), which the paper is about.
    4. σ are those of the method's norm, of which only `svd` has those of W itself, as the paper. Of
       a curve that is cut at break-even, the last one stands for σ_min.

    It depends on the order of the blocks: exchanging the data of two blocks does not exchange their
    assignments.
    """

    source: ClassVar[str] = "arXiv 2410.03111"
    reconstruction: ClassVar[str] = (
        "Of arXiv 2410.03111 a digest is known: the formula of ranks and its bounds are ours."
    )
    departure: ClassVar[str] = (
        "The formula of ranks is a reconstruction; the smallest rank follows from the budget; "
        "queries and attention are those of transformers."
    )
    use: ClassVar[str] = (
        "For a smaller cache from the weights alone: `--method svd --keep-cache`. It saves memory "
        "and no time."
    )
    is_for_cache: ClassVar[bool] = True

    largest: float = 1.0
    """d_max as a fraction of the width."""

    def __post_init__(self) -> None:
        check_number("lorc: largest", self.largest, 0.001, 1)

    @property
    def divides_costs(self) -> bool:
        return True

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: As `Budget.total`.
            InputError: A singular value is not a number.
        """
        total, form = budget.total(linears), budget.form
        depth = depths(linears, curves)
        allowed = [(each, budget.ranks.of(each)) for each in linears]

        def at(step: int) -> dict[str, Assignment]:
            first = self.largest * min(step / STEPS, 1)
            last = self.largest * max(step / STEPS - 1, 0)
            shares = {block: first * (1 - t) + last * t for block, t in depth.items()}
            return {
                each.name: _assigned(each, shares[each.block], ranks, form)
                for each, ranks in allowed
            }

        # the smallest of every linear, which the budget holds
        low, high = 0, 2 * STEPS
        while low < high:
            middle = (low + high + 1) // 2
            if plan_cost(linears, at(middle), budget.cost) <= total:
                low = middle
            else:
                high = middle - 1
        return make_plan(linears, at(low), total, budget.cost)


def depths(linears: Sequence[Linear], curves: Mapping[str, Curve]) -> dict[int, float]:
    """Return t_l by block, ascending from 0 to 1 with depth; 1 everywhere if all κ̃ are equal.

    Raises:
        InputError: A singular value is not a number.
    """
    logs: dict[int, float] = {}
    for linear in linears:
        found = log_condition(linear, curves[linear.name])
        logs[linear.block] = logs.get(linear.block, 0.0) + found
    blocks = sorted(logs)
    cumulative = np.cumsum([logs[block] for block in reversed(blocks)])[::-1]
    most, least = float(cumulative[0]), float(cumulative[-1])
    if most == least:
        return dict.fromkeys(blocks, 1.0)
    return {
        block: (most - float(each)) / (most - least)
        for block, each in zip(blocks, cumulative, strict=True)
    }


def log_condition(linear: Linear, curve: Curve) -> float:
    """Return log κ of a linear, at least 0; 0 for a weight without energy.

    Raises:
        InputError: A singular value is not a number.
    """
    width = min(linear.out_features, linear.in_features)
    energies = curve.energies[:width]
    if not len(energies) or not np.isfinite(energies).all():
        raise InputError(
            f"{linear.name}: a singular value is not a number, and lorc takes the ratio of the "
            "largest to the smallest; check the weight, or give another allocation"
        )
    most, least = float(energies[0]), float(energies[-1])
    if most <= 0:
        return 0.0
    return 0.5 * math.log(most / max(least, SMALLEST**2 * most))


def _assigned(linear: Linear, share: float, ranks: np.ndarray, form: Form) -> Assignment:
    """Assign a share of the width, rounded down to an allowed rank, at least the smallest."""
    if share >= 1 or not len(ranks):
        return Assignment(form="dense")
    # a share is a float; corrects less than one value in total
    width = min(linear.out_features, linear.in_features) * (1 + 1e-13)
    fits = int(np.searchsorted(ranks, math.floor(share * width), side="right"))
    return Assignment(form=form.name, rank=int(ranks[max(fits, 1) - 1]))
