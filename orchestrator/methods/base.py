"""What a method is to the rest of the system."""

from collections.abc import Sequence
from dataclasses import Field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram
from orchestrator.linalg.ranked import RankedParts
from orchestrator.linalg.sparse import Sparse
from orchestrator.linalg.two_sided_sparse import SparseLowRank
from orchestrator.plan.grouping import Grouping, gram_side
from orchestrator.plan.linear import Linear


class Method(Protocol):
    """One published way to turn a linear and its statistics into something to cut from.

    A frozen dataclass, of this class, whose fields are its options; what is said here with a value
    holds for those that say nothing else.

    Laws: `decompose` is a function of the options and its arguments alone, to the bit; any size of
    its result is a slice of any larger one; `energies` and `total` say what a cut loses.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the method's results change; older units are then computed again."""
    form: ClassVar[str] = "low_rank"
    """What a linear becomes where it is cut."""
    allocation: ClassVar[str] = "uniform"
    """The allocator that the paper uses."""
    magnitudes: ClassVar[bool] = False
    """Whether `decompose` needs the mean magnitude of every input, beside a Gram."""
    bends_outputs: ClassVar[bool] = False
    """Whether a curvature is that of the outputs, [O, O], where O > I too."""

    @property
    def labels(self) -> int:
        """Labels drawn for each token, whose losses' gradients make the curvature that `decompose`
        needs; none, and no backward pass."""
        return 0

    @property
    def decomposition(self) -> str:
        """Name of what is stored, with every option that changes it.

        Methods that share it cut their sizes from the same units.
        """
        ...

    @property
    def grouping(self) -> Grouping:
        """Which linears are decomposed as one, and share its basis; none."""
        return Grouping()

    def refits(self, keep: float) -> bool:
        """Whether left factors are fitted again to the compressed model's inputs; they are not."""
        return False

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """Which Gram this linear needs, given all targeted linears of its site.

        The output Gram where no linear of the site needs H and it is smaller than H. The left
        singular vectors need no more. Where H is there anyway it is the better one: its products
        of inputs are rounded once, those of outputs twice.
        """
        return gram_side(linear, site)

    def decompose(
        self, weight_OI: Tensor, statistic: InputGram | OutputGram, rank: int
    ) -> LowRank | Sparse | RankedParts | SparseLowRank:
        """What is stored of one linear: low rank up to `rank`, sparse to any density, or both."""
        ...
