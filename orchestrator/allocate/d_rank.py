"""D-Rank: ranks by effective rank, with budget moved from Q and K to V (arXiv 2509.25622).

Indices: G linears (groups of one) that share a budget, K steps of a linear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import numpy as np

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, by_role, make_plan
from orchestrator.allocate.steps import spend
from orchestrator.allocate.uniform import Uniform
from orchestrator.errors import UsageError
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.curve import Curve
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_choice, check_number

GIVERS, TAKER = ("q_proj", "k_proj"), "v_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class DRankAllocator(Allocator):
    """Minimises Σ R_g / k_g under Σ k_g ω_g = T: k_g = T / Σ √(R ω) · √(R_g / ω_g).

    R is the effective rank exp(−Σ p ln p), p the squared singular values in the method's norm over
    their sum; ω is the stored values per rank; T is the budget. A group is one linear here.

    `setting="exact"` is a departure. It minimises over integers; a linear that reaches break-even
    becomes dense (and counts as the fractional rank of equal size). The next rank goes to the
    linear with the largest R (1/k − 1/(k+1)) / ω. No plan with as few values has a smaller sum; the
    ranks follow min(break-even, C √(R/ω)), the water-filling solution, with C determined by the
    budget. Rebalancing moves the fraction beta of the budgets of Q and K to V, at most until V is
    dense, and each of the three is solved again. Every rank and the stored total grow with the
    budget; the modelled loss falls.

    `setting="paper"` rounds the formula above to the nearest rank, at least 1; if this exceeds the
    budget, the ranks that were rounded up most are reduced first. A linear that reaches break-even
    is stored dense, which is exact and not larger than its factors; the values that this saves stay
    unused (the paper limits ranks to min(m, n) and does not discuss break-even). Rebalancing scales
    the ranks of Q and K by 1 − beta and adds the same number of ranks to every V, up to min(m, n);
    the remainder returns to Q and K in proportion. Not monotone in the budget, and not every linear
    is dense at a kept fraction of 1.

    Rebalancing is counted in stored values. With as many heads for K and V as for Q this gives the
    paper's ranks; with fewer, the paper's formulas would miss the budget. Departures from the
    authors' code: the budget is met from below, where theirs takes up to 2 G steps of one rank
    around it; `accept` and `scope` are not in the paper. Pivoted factors are refused, since the
    formulas assume a constant cost per rank.
    """

    source: ClassVar[str] = "arXiv 2509.25622"
    setting: Literal["exact", "paper"] = "exact"
    """Optimum over integers (`exact`), or the rounded closed form (`paper`)."""
    scope: Literal["type", "model"] = "type"
    """Linears with a common budget: those of one type, as in the paper, or all of them."""
    beta: float = 0.0
    """Fraction of the values of Q and K that moves to V; 0.3 to 0.4 in the paper."""
    accept: Literal["none", "code"] = "none"
    """`code`: the test of the authors' code. The ranks of a type are accepted only if they truncate
    less energy than uniform ranks; otherwise uniform ranks are used. q, k and v are not tested, and
    gate_proj is always uniform."""

    def __post_init__(self) -> None:
        check_choice("d-rank: setting", self.setting, ("exact", "paper"))
        check_choice("d-rank: scope", self.scope, ("type", "model"))
        check_choice("d-rank: accept", self.accept, ("none", "code"))
        check_number("d-rank: beta", self.beta, 0, 1)
        if self.accept == "code" and self.scope == "model":
            raise UsageError(
                "d-rank: accept is 'code' and scope is 'model'; 'code' compares with uniform ranks "
                "within the budget of one type, so give scope 'type'"
            )

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Curve],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            UsageError: Ranks of the form differ in price, or beta is above 0 without exactly one
                type each of q_proj, k_proj and v_proj.
            InfeasibleError: As `Budget.total`; also if a budget is below rank 1 for each of its
                linears.
        """
        if not budget.form.has_fixed_price:
            raise UsageError(
                "d-rank: its formulas want one price for every rank, and ranks of form "
                f"{budget.form.name!r} differ in price; give another allocation, or storage "
                "'plain' if factors are pivoted"
            )
        total = budget.total(linears)
        types = by_role(linears)
        trio = _find_trio(types) if self.beta > 0 else None
        effective = {each.name: effective_rank(each, curves[each.name]) for each in linears}
        if self.setting == "exact":
            assignments = self._exact(types, budget, effective, trio)
        else:
            assignments = self._paper(types, budget, effective, trio)
        if self.accept == "code":
            assignments = _accept(types, curves, budget, assignments)
        return make_plan(linears, assignments, total)

    def _pools(self, types: Mapping[str, list[Linear]]) -> dict[str, list[Linear]]:
        """Return the linears of each budget, by a name for messages."""
        if self.scope == "type":
            return dict(types)
        return {"the model": [linear for group in types.values() for linear in group]}

    def _exact(
        self,
        types: Mapping[str, list[Linear]],
        budget: Budget,
        effective: Mapping[str, float],
        trio: Sequence[str] | None,
    ) -> dict[str, Assignment]:
        assignments: dict[str, Assignment] = {}
        for where, pool in self._pools(types).items():
            assignments |= _minimise(
                pool, effective, budget.share(pool), where=where, allowed=budget.ranks
            )
        if trio is None:
            return assignments
        if self.scope == "type":
            held = [budget.share(types[role]) for role in trio]
        else:
            held = [_stored(types[role], assignments) for role in trio]
        most = sum(linear.values for linear in types[trio[-1]])
        for role, share in zip(trio, rebalance(held, most, self.beta), strict=True):
            where = f"{role} at beta {self.beta}"
            assignments |= _minimise(
                types[role], effective, share, where=where, allowed=budget.ranks
            )
        return assignments

    def _paper(
        self,
        types: Mapping[str, list[Linear]],
        budget: Budget,
        effective: Mapping[str, float],
        trio: Sequence[str] | None,
    ) -> dict[str, Assignment]:
        pools = self._pools(types)
        shares = {where: budget.share(pool) for where, pool in pools.items()}
        ranks: dict[str, float] = {}
        for where, pool in pools.items():
            ranks |= closed_form(pool, effective, shares[where])
        if trio is not None:
            ranks |= _rebalance_ranks([types[role] for role in trio], ranks, self.beta)
            if self.scope == "type":
                # moving values between the three changes only their separate budgets, not the
                # common one
                joined = [linear for role in trio for linear in pools.pop(role)]
                where = ", ".join(trio)
                pools[where], shares[where] = joined, sum(shares.pop(role) for role in trio)
        assignments: dict[str, Assignment] = {}
        for where, pool in pools.items():
            assignments |= _round(pool, ranks, shares[where], where=where, allowed=budget.ranks)
        return assignments


def effective_rank(linear: Linear, curve: Curve) -> float:
    """Compute exp(−Σ p ln p), p the squared singular values over their sum; 1 if all are 0.

    Between 1 and min(m, n). If the curve is truncated, the remaining energy counts as spread evenly
    over the unlisted directions. This is an upper bound; for a remaining fraction ε its exponent is
    too large by at most ε ln(number of unlisted directions).
    """
    unlisted = min(linear.out_features, linear.in_features) - len(curve.energies)
    rest = max(curve.total - float(curve.energies.sum()), 0.0) if unlisted > 0 else 0.0
    energies = curve.energies[curve.energies > 0]
    total = float(energies.sum()) + rest
    if total <= 0:
        return 1.0
    p = energies / total
    entropy = -float(p @ np.log(p))
    if rest > 0:
        entropy -= rest / total * math.log(rest / total / unlisted)
    return math.exp(entropy)


def closed_form(
    linears: Sequence[Linear], effective: Mapping[str, float], budget: int
) -> dict[str, float]:
    """Compute k_g = T / Σ √(R ω) · √(R_g / ω_g) for each linear, without rounding or bounds."""
    effective_G = np.array([effective[linear.name] for linear in linears])
    cost_G = np.array([float(linear.rank_cost) for linear in linears])
    level = budget / float(np.sqrt(effective_G * cost_G).sum())
    ranks_G = level * np.sqrt(effective_G / cost_G)
    return {linear.name: float(rank) for linear, rank in zip(linears, ranks_G, strict=True)}


def rebalance(held: Sequence[int], most: int, beta: float) -> list[int]:
    """Move the fraction beta of the budgets of q and k to v, up to the limit `most` of v.

    The excess stays with q and k in proportion. Each budget is rounded down: at most two values are
    lost in total.
    """
    query, key, value = held
    given = min(Fraction(str(beta)), Fraction(most - value, query + key))
    return [
        math.floor(query * (1 - given)),
        math.floor(key * (1 - given)),
        value + math.floor(given * (query + key)),
    ]


def _minimise(
    linears: Sequence[Linear],
    effective: Mapping[str, float],
    budget: int,
    *,
    where: str,
    allowed: AllowedRanks,
) -> dict[str, Assignment]:
    """Minimise Σ R / k over allowed ranks: steps in ascending order of stored values per gain.

    Rank k' after k gains R (1/k - 1/k') for (k' - k) ω values. The dense weight counts as rank
    m n / ω.
    """
    keys = []
    for linear in linears:
        ends = allowed.of(linear)
        rank_K = np.concatenate([[0.0], ends])
        after_K = np.append(ends * linear.rank_cost, linear.values)
        keys.append(rank_K * after_K / effective[linear.name])
    return spend(linears, keys, budget, where=where, ranks=allowed)


def _round(
    linears: Sequence[Linear],
    ranks: Mapping[str, float],
    budget: int,
    *,
    where: str,
    allowed: AllowedRanks,
) -> dict[str, Assignment]:
    """Round the ranks within the budget: steps in ascending order of the excess over the real rank.

    Steps that exceed it by more than half a step are not taken.
    """
    keys = []
    for linear in linears:
        step = allowed.step(linear)
        passed_K = step * np.arange(1, allowed.count(linear) + 2) - ranks[linear.name]
        keys.append(np.where(passed_K > step / 2, np.inf, passed_K))
    return spend(linears, keys, budget, where=where, ranks=allowed)


def _find_trio(types: Mapping[str, list[Linear]]) -> list[str]:
    """Find the roles of q, k and v."""
    trio = []
    for name in (*GIVERS, TAKER):
        found = [role for role in types if _last(role) == name]
        if len(found) != 1:
            raise UsageError(
                f"d-rank: beta is above 0, which needs one type of linear named {name}; found "
                f"{', '.join(found) or 'none'} among those targeted; give beta 0"
            )
        trio += found
    return trio


def _rebalance_ranks(
    trio: Sequence[Sequence[Linear]], ranks: Mapping[str, float], beta: float
) -> dict[str, float]:
    """Move the fraction beta of the real ranks of Q and K to V, with equal ranks for every V."""
    givers, takers = [*trio[0], *trio[1]], trio[2]
    offered = beta * sum(ranks[linear.name] * linear.rank_cost for linear in givers)
    each = offered / sum(linear.rank_cost for linear in takers)
    raised, taken = {}, 0.0
    for linear in takers:
        rank = ranks[linear.name]
        cap = min(linear.out_features, linear.in_features)
        raised[linear.name] = min(rank + each, max(rank, cap))
        taken += (raised[linear.name] - rank) * linear.rank_cost
    left = 1 - beta * taken / offered
    return raised | {linear.name: left * ranks[linear.name] for linear in givers}


def _accept(
    types: Mapping[str, list[Linear]],
    curves: Mapping[str, Curve],
    budget: Budget,
    assignments: Mapping[str, Assignment],
) -> dict[str, Assignment]:
    """Replace assignments by uniform ones for every type that fails the authors' test."""
    accepted = dict(assignments)
    for role, group in types.items():
        if _last(role) in (*GIVERS, TAKER):
            continue
        uniform = Uniform()(group, curves, budget, cosines={}).assignments
        lost = sum(_loss(curves[each.name], assignments[each.name]) for each in group)
        if _last(role) == "gate_proj" or not lost < sum(
            _loss(curves[each.name], uniform[each.name]) for each in group
        ):
            accepted |= uniform
    return accepted


def _loss(curve: Curve, assignment: Assignment) -> float:
    return 0.0 if assignment.form == "dense" else curve.loss(assignment.rank)


def _stored(linears: Sequence[Linear], assignments: Mapping[str, Assignment]) -> int:
    return sum(assignments[linear.name].stored_values(linear) for linear in linears)


def _last(role: str) -> str:
    return role.rpartition(".")[2]
