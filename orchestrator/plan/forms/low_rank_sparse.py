"""Two factors of a weight, and some entries of what they leave."""

from orchestrator.plan.forms.base import Cut, Form
from orchestrator.plan.forms.index_sizes import index_code, smallest_index
from orchestrator.plan.linear import Linear


class LowRankSparseForm(Form):
    """Factors [O, R] and [R, I], N entries, and the smallest index of their positions."""

    name = "low_rank_sparse"
    title = "low-rank plus sparse"
    module = "orchestrator.models.forms.low_rank_sparse:LowRankSparseLinear"
    has_rank = True
    has_nonzeros = True

    def values(self, linear: Linear, cut: Cut) -> int:
        """R (O + I) + N."""
        return self.factor_values(linear, cut.rank) + cut.nonzeros

    def index_bytes(self, linear: Linear, cut: Cut) -> int:
        """Bytes of the smallest index of N positions."""
        return smallest_index(linear.out_features, linear.in_features, cut.nonzeros)

    def index_code(self, linear: Linear, cut: Cut) -> str:
        """Name of the code of that index."""
        return index_code(linear.out_features, linear.in_features, cut.nonzeros)


LOW_RANK_SPARSE = LowRankSparseForm()
