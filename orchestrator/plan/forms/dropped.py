"""Linears of experts that are dropped: neither values nor operations."""

from orchestrator.plan.forms.base import Cut, Divided, Form
from orchestrator.plan.linear import Linear


class DroppedForm(Form):
    """No tensor of the linear is stored; its outputs are 0.

    The linears of an expert are dropped together, so that a plan decides about whole experts.
    """

    name = "dropped"
    title = "dropped"
    module = "orchestrator.models.forms.dropped:DroppedLinear"

    @property
    def divided(self) -> Divided:
        return "experts"

    def values(self, linear: Linear, cut: Cut) -> int:
        return 0

    def least_values(self, linear: Linear) -> int:
        return 0


DROPPED = DroppedForm()
