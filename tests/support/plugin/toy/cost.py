"""Cost of the method's results, for the forecast."""

from orchestrator.forecast.work import Work
from orchestrator.methods.kinds.costs.base import KindCost


class DiagonalCost(KindCost):
    """One product of the weight and its Gram, and a value and two energies for each output."""

    def stored_rank(self, linear, *, pivoted):
        return 0

    def stored_bytes(self, linear, *, pivoted, itemsize):
        return (itemsize + 16) * linear.out_features

    def decomposing(self, linear, given, *, pivoted, itemsize):
        stored = self.stored_bytes(linear, pivoted=pivoted, itemsize=itemsize)
        return Work(double=2.0 * linear.values * given.gram, write=stored)

    def workspace(self, linear, given, rank):
        return 8 * (3 * linear.values + given.gram**2)
