"""Linears of experts that use one dense weight together."""

from orchestrator.plan.forms.base import Cut, Divided, Form
from orchestrator.plan.linear import Linear


class TiedForm(Form):
    """One weight [O, I], stored with the first linear of a cluster; the others name it."""

    name = "tied"
    title = "tied"
    module = "orchestrator.models.forms.tied:TiedLinear"

    @property
    def divided(self) -> Divided:
        return "clusters"

    def values(self, linear: Linear, cut: Cut) -> int:
        """O I, or 0 if the weight is another linear's."""
        return 0 if cut.basis else linear.values

    def operations(self, linear: Linear, cut: Cut) -> int:
        """O I: a token multiplies by the weight, whoever stores it."""
        return linear.values

    def least_values(self, linear: Linear) -> int:
        return 0


TIED = TiedForm()
