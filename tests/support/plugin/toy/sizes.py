"""A form from outside the package, its sizes: a weight [O, I] that is 0 but for w[o, o mod I]."""

from orchestrator.plan.forms import Form


class DiagonalForm(Form):
    """One value for each output."""

    name = "diagonal"
    title = "diagonal"
    module = "toy.linear:DiagonalLinear"

    def values(self, linear, cut):
        return linear.out_features

    def least_values(self, linear):
        return linear.out_features
