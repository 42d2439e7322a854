"""Wanda: pruning by weights and activations (Sun et al., ICLR 2024, arXiv 2306.11695)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.errors import InputError
from orchestrator.methods.base import Method
from orchestrator.methods.kinds.sparse import SPARSE, SparseKind
from orchestrator.plan.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, OutputGram
    from orchestrator.linalg.sparsity.sparse import Sparse


@dataclass(frozen=True, slots=True)
class Wanda(Method):
    """Keep the weights of each output with the largest |W_ij| · |x_j|₂, unchanged.

    |x_j|₂ is the norm of input j over the calibration tokens, the root of H's diagonal. Scores
    are compared within a row, as the paper does for language models, so every row keeps the same
    number of entries, to within one.

    The entries are stored once, 8 bytes each (value and position): all of them, four times a
    weight of 16 bits, since any kept fraction is cut from the same unit.

    Departures from the authors' code: every linear is pruned on inputs of the dense model, where
    theirs feeds each block the outputs of the pruned ones before it; no n:m patterns.
    """

    name: ClassVar[str] = "wanda"
    source: ClassVar[str] = "arXiv 2306.11695"
    departure: ClassVar[str] = (
        "Blocks are pruned on inputs of the dense model, not of the pruned blocks before; no n:m "
        "patterns."
    )
    use: ClassVar[str] = "As the sparse baseline, in one forward pass; it saves bytes and no time."
    decomposition: ClassVar[str] = "wanda"
    form: ClassVar[str] = "sparse"

    @property
    def kind(self) -> SparseKind:
        return SPARSE

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        return "input"

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "Sparse":
        """
        Raises:
            InputError: As `sort_within_rows`; also when H has a negative diagonal.
        """
        from orchestrator.linalg.low_rank import InputGram
        from orchestrator.linalg.sparsity.sparse import sort_within_rows

        if not isinstance(statistic, InputGram):
            raise ValueError("wanda needs the Gram of the inputs, not that of the outputs")
        square_I = statistic.matrix_II.diagonal()
        if negative := int((square_I < 0).sum()):
            raise InputError(
                f"input Gram is no second moment: {negative} of {len(square_I)} diagonal entries "
                "are negative; calibrate again"
            )
        score_OI = weight_OI.abs() * square_I.double().sqrt()
        return sort_within_rows(weight_OI, score_OI, statistic)
