"""A method that keeps w[o, o mod I] of every output o."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.methods.base import Method
from toy.kind import DIAGONAL


@dataclass(frozen=True, slots=True)
class Diagonal(Method):
    """Keep one weight of each output.

    The others are 0: a poor approximation, whose loss has a closed form.
    """

    fit: bool = False
    """True: fit the kept weights to the outputs by least squares."""

    name: ClassVar[str] = "diagonal"
    source: ClassVar[str] = "arXiv 0000.00000"
    form: ClassVar[str] = "diagonal"
    allocation: ClassVar[str] = "whole-linears"

    @property
    def kind(self):
        return DIAGONAL

    @property
    def decomposition(self):
        return f"diagonal {self.fit}"

    def side(self, linear, site):
        return "input"

    def decompose(self, weight_OI, statistic, rank):
        from toy.result import decompose_diagonal

        return decompose_diagonal(weight_OI, statistic.matrix_II, fit=self.fit)
