"""Allocation of whole experts by their saliency: those with the least are dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.errors import InfeasibleError
from orchestrator.plan.forms import Divided
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.plan.saliency import Saliency
from orchestrator.plan.whole_experts import (
    Expert,
    check_routers,
    chosen_by_module,
    experts_by_module,
)
from orchestrator.recipe.options import check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class ReapAllocator(Allocator):
    """Keeps the experts with the largest saliency, each dense, and drops the others.

    `block` keeps floor(keep E) of the E experts of every block, as published: then all blocks are
    alike. `model` takes experts from one ranking over all blocks, until the next one does not fit,
    once each block has as many as its router chooses for a token. Ties keep the order of the model.
    """

    source: ClassVar[str] = "arXiv 2510.13999"
    divides: ClassVar[tuple[Divided, ...]] = ("experts",)

    scope: Literal["block", "model"] = "block"
    """Experts among which saliencies are compared: those of a block, or of the whole model."""
    router: Literal["reroute", "zero"] = "reroute"
    """Routers lose the rows of dropped experts, as published, or stay; outputs of those are 0."""

    def __post_init__(self) -> None:
        check_choice("reap: scope", self.scope, ("block", "model"))
        check_choice("reap: router", self.router, ("reroute", "zero"))

    @property
    def is_even(self) -> bool:
        return self.scope == "block"

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Any],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Allocate the budget.

        Raises:
            InfeasibleError: A block would have fewer experts than its router chooses.
            UsageError: As `experts_by_module`.
        """
        self.check_budget(linears, budget)
        total, kept = budget.total(linears), list[Expert]()
        ranked = {
            module: sorted(experts, key=lambda each: -_saliency(each, curves))
            for module, experts in experts_by_module(linears, budget.experts).items()
        }
        if self.scope == "block":
            for experts in ranked.values():
                kept += experts[: budget.floor(len(experts))]
        else:
            chosen = chosen_by_module(budget.experts)
            for module, experts in ranked.items():
                kept += experts[: chosen[module]]
            others = [e for module, each in ranked.items() for e in each[chosen[module] :]]
            left = total - sum(each.values for each in kept)
            for expert in sorted(others, key=lambda each: -_saliency(each, curves)):
                if expert.values > left:
                    break
                left -= expert.values
                kept.append(expert)
        dense = {linear.name for expert in kept for linear in expert.linears}
        assignments = {
            each.name: Assignment(form="dense" if each.name in dense else budget.form.name)
            for each in linears
        }
        plan = make_plan(linears, assignments, total)
        return replace(plan, reroutes=self.router == "reroute")

    def check_budget(self, linears: Sequence[Linear], budget: Budget) -> None:
        """Check that a block can keep as many experts as its router chooses.

        Raises:
            InfeasibleError: It cannot.
            UsageError: As `experts_by_module` and `check_routers`.
        """
        if self.router == "reroute":
            check_routers(budget.experts, "reap.router=zero")
        chosen = chosen_by_module(budget.experts)
        modules = experts_by_module(linears, budget.experts)
        for module, experts in modules.items():
            count, least = budget.floor(len(experts)), chosen[module]
            if self.scope == "block" and count < least:
                raise InfeasibleError(
                    f"keep: {budget.kept} of the {len(experts)} experts of {module} is {count}, "
                    f"and its router chooses {least} for a token; the least possible is "
                    f"{least / len(experts):.6f}"
                )
        least = sum(
            each.values for module, experts in modules.items() for each in experts[: chosen[module]]
        )
        if (total := budget.total(linears)) < least:
            raise InfeasibleError(
                f"keep: {budget.kept} allows {total} values, and the experts that routers choose "
                f"for a token store {least}; keep more"
            )


def _saliency(expert: Expert, curves: Mapping[str, Saliency]) -> float:
    return curves[expert.linears[0].name].mean
