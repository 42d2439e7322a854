"""What a method is to the rest of the system."""

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram
from orchestrator.plan import Linear


class Method(Protocol):
    """One published way to turn a linear and its statistics into something to cut from.

    Laws: `decompose` is a function of its arguments alone, to the bit; its result at rank r is a
    slice of its result at any larger rank; `energies` and `total` say what a cut loses.
    """

    @property
    def name(self) -> str: ...

    @property
    def decomposition(self) -> str:
        """Name of what is stored; methods that share it cut their sizes from the same units."""
        ...

    @property
    def version(self) -> int:
        """Raised when the method's results change; older units are then computed again."""
        ...

    @property
    def allocation(self) -> str:
        """The allocator that the paper uses."""
        ...

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """Which Gram this linear needs, given all targeted linears of its site."""
        ...

    def decompose(
        self, weight_OI: Tensor, statistic: InputGram | OutputGram, rank: int
    ) -> LowRank: ...
