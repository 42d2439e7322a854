"""Two factors of a weight, of which linears that write to one place share the left one."""

from orchestrator.plan.forms.base import Cut, Form
from orchestrator.plan.linear import Linear


class OutputBasisForm(Form):
    """Factors [O, R] and [R, I]; linears that share an output basis store the first one once.

    n linears on one output basis are one of n I inputs, [O, n I], at O + n I values a rank.
    """

    name = "output_basis"
    title = "low-rank with an output basis"
    module = "orchestrator.models.forms.output_basis:OutputBasisLinear"
    has_rank = True
    shares_left = True

    def values(self, linear: Linear, cut: Cut) -> int:
        """R I, and R O unless the basis is another linear's."""
        own_basis = 0 if cut.basis else cut.rank * linear.out_features
        return cut.rank * linear.in_features + own_basis


OUTPUT_BASIS = OutputBasisForm()
