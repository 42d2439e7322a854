"""Dense weights: linears that are not compressed."""

from orchestrator.plan.forms.base import Cut, Form
from orchestrator.plan.linear import Linear


class DenseForm(Form):
    """The weight [O, I] as it is."""

    name = "dense"
    title = "dense"

    def values(self, linear: Linear, cut: Cut) -> int:
        return linear.values


DENSE = DenseForm()
