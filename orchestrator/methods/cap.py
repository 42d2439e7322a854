"""CAP: composition-aware pruning, global rank and sparsity (arXiv 2505.03801)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.errors import UsageError
from orchestrator.methods.base import Method
from orchestrator.methods.kinds.ranked import RANKED, RankedKind
from orchestrator.plan.linear import Linear
from orchestrator.recipe.options import check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, OutputGram
    from orchestrator.linalg.ranked import RankedParts, Utility
    from orchestrator.linalg.sparsity.rpca import Solver


@dataclass(frozen=True, slots=True)
class Cap(Method):
    """A robust PCA W = L + S of every linear; what stays of both is one global choice.

    Stage 1 is here: min |L|_* + |S|_1 / sqrt(max(m, n)) subject to W = L + S, on the actors, with
    iterations, residual, rank and density in the report. Stage 2, the choice, is the allocation of
    the same name. In the table `[cap]` of a recipe stand the options of both.

    All of L and S is stored once, for any kept fraction: rank (m + n) values, and 8 bytes an
    entry. At the 65 % of full rank and 70 % density that trained weights show, L and S take four
    times the bytes of a square weight of 16 bits; a model of 70B takes 0.5 TB of run directory.

    Left open by the sources we have: schedule of mu, stopping rule, and what makes a direction
    comparable with an entry. Utilities a stored value are ours: the energy that a piece gives the
    outputs on the calibration tokens, over its cost; `magnitude` is the same without activations.

    Departures: L and S are kept as they come out, where the paper re-balances L's factors by the
    root of the singular values (`weight` has orthonormal columns here, the product is the same).
    """

    utility: "Utility" = "activation"
    buckets: int = 64
    """Number of buckets of equal size: the driver has a linear's entries summed up in them, and the
    entries of a bucket share a keep-probability. 0: a bucket for each entry, as in the paper, for
    small models only (see the allocator)."""
    solver: "Solver" = "ialm"

    name: ClassVar[str] = "cap"
    source: ClassVar[str] = "arXiv 2505.03801"
    departure: ClassVar[str] = (
        "Schedule, stopping rule and utilities are ours, as the sources leave them open; the "
        "factors of L are not balanced."
    )
    use: ClassVar[str] = "To compare with: `two-sided-sparse` lost far less in our results."
    version: ClassVar[int] = 3
    form: ClassVar[str] = "low_rank_sparse"
    allocation: ClassVar[str] = "cap"

    def __post_init__(self) -> None:
        check_choice("cap: utility", self.utility, ("activation", "magnitude"))
        check_choice("cap: solver", self.solver, ("ialm", "admm_fixed_mu"))
        if type(self.buckets) is not int or self.buckets < 0:
            raise UsageError(
                f"cap: buckets is {self.buckets!r}; it must be a whole number, 0 for one an entry"
            )

    @property
    def kind(self) -> RankedKind:
        return RANKED

    @property
    def decomposition(self) -> str:
        return f"robust-pca {self.solver} {self.utility} {self.buckets}"

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        return "input"

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "RankedParts":
        """Everything, whatever `rank`: the choice may take any direction and any entry.

        Raises:
            InputError: As `rpca` and `rank_parts`.
        """
        from orchestrator.linalg.low_rank import InputGram
        from orchestrator.linalg.ranked import rank_parts
        from orchestrator.linalg.sparsity.rpca import rpca

        if not isinstance(statistic, InputGram):
            raise ValueError("cap needs the Gram of the inputs, not that of the outputs")
        parts = rpca(weight_OI, solver=self.solver)
        return rank_parts(weight_OI, parts, statistic, utility=self.utility, buckets=self.buckets)
