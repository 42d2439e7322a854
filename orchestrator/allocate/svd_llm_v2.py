"""SVD-LLM v2: allocation by the logarithm of the truncation loss (arXiv 2503.12340).

Indices: N linears of one type, K steps of a linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, by_role, make_plan
from orchestrator.allocate.scale import find_scale
from orchestrator.allocate.steps import spend, step_costs
from orchestrator.errors import InfeasibleError
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_number

LEAST_LOG = 1e-6
"""Replacement for the logarithm of a loss of 1 or less, for which the paper's formula is
undefined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SvdLlmV2Allocator(Allocator):
    """Removed fraction of linear i in its type of N linears: N R s_i / Σ s, s_i = 1 / ln L_i.

    R is the requested removed fraction and L_i = |(W − W') X|_F the loss at uniform rank, the root
    of the curve's tail there: linears with a large loss are truncated less. Each type has its own
    budget.

    Not specified by the paper: L is the sum over all calibration tokens, not normalised, so the
    result depends on their number. The formula needs L > 1; as L approaches 1 the score diverges,
    and a loss of 1 or less uses that limit: such linears are truncated to the cap before all
    others, and equally. Removed fractions are clipped to [0, most_removed] and the factor N R / Σ s
    is solved for again, so that the budget of the type holds. Shares become ranks by largest
    remainder: each linear gets the ranks that its share holds, then those that exceed their share
    least, until the next one does not fit.

    Not monotone in the budget: the scores depend on the uniform rank and therefore on the budget,
    so a larger budget can lower the rank of a linear. The stored total falls by at most the rank
    that did not fit.
    """

    source: ClassVar[str] = "arXiv 2503.12340"
    most_removed: float = 0.95
    """Largest fraction that may be removed of one linear."""

    def __post_init__(self) -> None:
        check_number("svd-llm-v2: most_removed", self.most_removed, 0, 1)

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: As `Budget.total`; also if more than `most_removed` would have to be
                removed, or the share of a type is below rank 1 for each of its linears.
        """
        total, ranks = budget.total(linears), budget.ranks
        if budget.kept + self.most_removed < 1:
            raise InfeasibleError(
                f"keep: {budget.kept} removes more than {self.most_removed}, the most that "
                "svd-llm-v2 may remove of a linear; keep more, or raise its most_removed"
            )
        assignments: dict[str, Assignment] = {}
        for role, group in by_role(linears).items():
            share = budget.share(group)
            loss_N = [_uniform_loss(each, curves[each.name], budget) for each in group]
            share_N = self._shares(group, np.array(loss_N), share)
            keys = [
                np.cumsum(step_costs(linear, ranks)) - held
                for linear, held in zip(group, share_N, strict=True)
            ]
            assignments |= spend(group, keys, share, where=role, ranks=ranks)
        return make_plan(linears, assignments, total)

    def _shares(self, group: Sequence[Linear], loss_N: np.ndarray, share: int) -> np.ndarray:
        """Compute the values that each linear of a type should store, [N].

        Their sum is at most `share`.
        """
        size_N = np.array([float(linear.values) for linear in group])
        # ln L = ln(L²) / 2
        score_N = 1 / np.maximum(np.log(np.maximum(loss_N, 1)) / 2, LEAST_LOG)
        removed = float(size_N.sum() - share)
        _, removed_N = find_scale(score_N, size_N, removed, low=0, high=self.most_removed)
        share_N: np.ndarray = (1 - removed_N) * size_N
        return share_N


def _uniform_loss(linear: Linear, curve: Curve, budget: Budget) -> float:
    """Return L², the energy truncated at the uniform rank."""
    rank = budget.form.rank_within(linear, budget.share([linear]))
    return curve.loss(max(min(rank, budget.form.break_even(linear) - 1), 0))
