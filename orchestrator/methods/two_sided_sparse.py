"""Sparse + low rank in the two-sided norm, under one budget for entries and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.errors import UsageError
from orchestrator.methods.base import Method
from orchestrator.methods.kinds.sparse_low_rank import SparseLowRankKind
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import check_number, check_whole

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, OutputGram
    from orchestrator.linalg.sparsity.two_sided_sparse import SparseLowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSidedSparse(Method):
    """Entries whose loss is felt most, and two-sided factors of what is left without them.

    The loss is that of `two-sided`: ½ trace(C D H D^T) in nats, H the inputs' second moment and C
    the gradients', in every linear alike. Entries are kept as they are, in the order of
    C_ii H_jj W_ij²; at each of a few densities the rest is truncated to every rank at its least
    loss. The allocation of the same name chooses entries and rank of every linear from these losses
    under one budget, so a linear may come out dense, sparse, as factors, or as both. Then the
    chosen entries are fitted together to what the factors leave (`linalg.sparsity.fit_entries`);
    the losses that are allocated by, and reported, are those before.

    Stored of each linear for any later size: the weight, two diagonals, from which the entries
    follow when files are written, and the factors at every density. Of a weight of 16 bits, with
    the default options, 6.2 bytes an entry (`wanda`: 8); and where entries are fitted O² + I² bytes
    for the correlations of C and H, for 28672 x 8192 another 3.8 an entry.

    Needs C whole where O > I, and H where I > O, which `two-sided` does not: for 70B 28672² values
    each for gate, up and down.

    Formulas derived here; Wanda's score (2306.11695) is this one for C = 1 within a row.
    """

    name: ClassVar[str] = "two-sided-sparse"
    departure: ClassVar[str] = (
        "Derived here from `two-sided`; for C = 1 its order of entries within a row is that of "
        "`wanda`."
    )
    use: ClassVar[str] = "For few bytes on disk and in memory at the least loss; it saves no time."
    version: ClassVar[int] = 2
    form: ClassVar[str] = "low_rank_sparse"
    allocation: ClassVar[str] = "two-sided-sparse"
    output_curvature: ClassVar[bool] = True

    damping: float = 0.01
    """Term added to the diagonal of C, as a fraction of the mean of the diagonal."""
    draws: int = 1
    """Labels drawn for each token; the variance of C falls with their number."""
    densities: str = "0 0.1 0.2 0.3 0.4 0.5 0.6"
    """Fractions of the entries beside which factors may stand, ascending from 0."""
    ranks: float = 0.3
    """The largest rank of such factors, as a fraction of break-even; 0: entries alone."""
    steps: int = 8
    """Conjugate gradient steps by which kept entries are fitted; 0: they stay the weight's own."""

    def __post_init__(self) -> None:
        check_number("two-sided-sparse: damping", self.damping, 1e-6, 1000)
        check_number("two-sided-sparse: ranks", self.ranks, 0, 1)
        check_whole("two-sided-sparse: draws", self.draws, 1, 1000)
        check_whole("two-sided-sparse: steps", self.steps, 0, 1000)
        said = f"two-sided-sparse: densities is {self.densities!r}; it must be"
        try:
            grid = self.grid
        except (AttributeError, ValueError) as error:
            raise UsageError(f'{said} numbers like "0 0.2 0.5"') from error
        if sorted(set(grid)) != [*grid] or not grid or grid[0] != 0 or not grid[-1] < 1:
            raise UsageError(f"{said} ascending numbers, 0 the first and all below 1")

    @property
    def grid(self) -> tuple[float, ...]:
        """The densities."""
        return tuple(float(word) for word in self.densities.replace(",", " ").split())

    @property
    def kind(self) -> SparseLowRankKind:
        return SparseLowRankKind(self.steps)

    @property
    def label_draws(self) -> int:
        return self.draws

    @property
    def decomposition(self) -> str:
        grid = " ".join(map(str, self.grid))
        options = f"damping={float(self.damping)} densities={grid} ranks={float(self.ranks)}"
        return f"two-sided-sparse {options} steps={self.steps}"

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        return "input"

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "SparseLowRank":
        """Everything, whatever `rank`: the choice is the allocation's.

        Raises:
            InputError: As `sparse_low_rank`.
        """
        from orchestrator.linalg.low_rank import InputGram
        from orchestrator.linalg.sparsity.two_sided_sparse import sparse_low_rank

        if not isinstance(statistic, InputGram):
            raise ValueError("two-sided-sparse needs the Gram of the inputs, not of the outputs")
        given = weight_OI, statistic, self.grid, self.ranks
        return sparse_low_rank(*given, damping=self.damping, fits=self.steps > 0)
