"""Two factors of a weight, and a bias of their own."""

from orchestrator.plan.forms.base import Cut, Ranks
from orchestrator.plan.forms.low_rank import LowRankForm
from orchestrator.plan.linear import Linear


class AffineForm(LowRankForm):
    """Factors [O, R] and [R, I], and a bias [O] that belongs to them: R (O + I) + O values.

    The bias of a linear that has one in the dense model is replaced, and counts no values, as no
    bias of a dense linear does.
    """

    name = "affine"
    title = "low-rank with a bias"
    module = "orchestrator.models.forms.affine:AffineLinear"
    has_bias = True
    has_fixed_price = False
    timed_as = "low_rank"

    def values(self, linear: Linear, cut: Cut) -> int:
        return self.factor_values(linear, cut.rank)

    def factor_values(self, linear: Linear, rank: Ranks) -> Ranks:
        """Number of values of factors of this rank with their bias."""
        found: Ranks = rank * linear.rank_cost + _added(linear)
        return found

    def break_even(self, linear: Linear) -> int:
        """Smallest rank whose factors and bias save nothing, floor(O (I - 1) / (O + I))."""
        return (linear.values - linear.out_features) // linear.rank_cost

    def rank_within(self, linear: Linear, values: int) -> int:
        """Largest rank whose factors and bias store at most `values`; 0 if none does."""
        return max(values - _added(linear), 0) // linear.rank_cost


def _added(linear: Linear) -> int:
    """Values of the bias that the dense linear does not have."""
    return 0 if linear.has_bias else linear.out_features


AFFINE = AffineForm()
