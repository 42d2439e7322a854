"""Some entries of a weight, and an index of their positions."""

from orchestrator.plan.forms.base import Cut, Form
from orchestrator.plan.forms.index_sizes import index_code, smallest_index
from orchestrator.plan.linear import Linear


class SparseForm(Form):
    """N entries, and the smallest index of their positions."""

    name = "sparse"
    title = "sparse"
    module = "orchestrator.models.forms.sparse:SparseLinear"
    has_nonzeros = True

    def values(self, linear: Linear, cut: Cut) -> int:
        return cut.nonzeros

    def index_bytes(self, linear: Linear, cut: Cut) -> int:
        """Bytes of the smallest index of N positions."""
        return smallest_index(linear.out_features, linear.in_features, cut.nonzeros)

    def index_code(self, linear: Linear, cut: Cut) -> str:
        """Name of the code of that index."""
        return index_code(linear.out_features, linear.in_features, cut.nonzeros)

    def least_values(self, linear: Linear) -> int:
        """One entry."""
        return 1


SPARSE = SparseForm()
