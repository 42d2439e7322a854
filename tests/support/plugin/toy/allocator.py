"""An allocator that decides which linears are cut."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.allocate.base import Allocator
from orchestrator.allocate.budget import make_plan
from orchestrator.plan.plan import Assignment
from orchestrator.recipe.options import check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeLinears(Allocator):
    """Cut all linears, then make dense the one with the largest gain, while the budget holds."""

    gain: Literal["loss", "loss_per_value"] = "loss_per_value"
    """Measure by which linears become dense."""

    divides: ClassVar[tuple[str, ...]] = ("linears",)

    def __post_init__(self):
        check_choice("whole-linears: gain", self.gain, ("loss", "loss_per_value"))

    def __call__(self, linears, curves, budget, cosines):
        total, form = budget.total(linears), budget.form
        cut = Assignment(form=form.name)
        more = {each.name: each.values - form.values(each, cut) for each in linears}
        left = total - sum(form.values(each, cut) for each in linears)
        assignments = {each.name: cut for each in linears}
        for linear in sorted(linears, key=lambda each: -self._gain(curves[each.name], each)):
            if more[linear.name] <= left:
                left -= more[linear.name]
                assignments[linear.name] = Assignment(form="dense")
        return make_plan(linears, assignments, total)

    def _gain(self, loss, linear):
        return loss.lost / (1 if self.gain == "loss" else linear.values)
