"""Two factors of a weight."""

from orchestrator.plan.forms.base import Cut, Form
from orchestrator.plan.linear import Linear


class LowRankForm(Form):
    """Factors [O, R] and [R, I]; linears that share a basis store the second one once."""

    name = "low_rank"
    title = "low-rank"
    module = "orchestrator.models.forms.low_rank:LowRankLinear"
    has_rank = True

    def values(self, linear: Linear, cut: Cut) -> int:
        """R O, and R I unless the basis is another linear's."""
        own_down = 0 if cut.basis else cut.rank * linear.in_features
        return cut.rank * linear.out_features + own_down


LOW_RANK = LowRankForm()
