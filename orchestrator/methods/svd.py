"""Plain SVD: the closest weight of each rank, whatever its inputs are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.methods.base import Method
from orchestrator.methods.kinds.low_rank import SCALED, ScaledKind

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram


@dataclass(frozen=True, slots=True)
class Svd(Method):
    """The truncated SVD of W: of all matrices of rank r the closest in the Frobenius norm.

    The statistics have no part in it. They are gathered for the report alone, which says what the
    weights lose on the calibration tokens; the curve that ranks are allocated by is that of the
    weight, its squared singular values.
    """

    name: ClassVar[str] = "svd"
    source: ClassVar[str] = "Eckart and Young, 1936"
    departure: ClassVar[str] = "Not at all; calibration tokens serve the report alone."
    use: ClassVar[str] = "As the baseline without statistics."
    decomposition: ClassVar[str] = "svd"

    @property
    def kind(self) -> ScaledKind[Any]:
        return SCALED

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "LowRank":
        import torch

        from orchestrator.linalg.scaled import decompose_scaled

        scale_I = torch.ones(weight_OI.shape[1], dtype=torch.float64, device=weight_OI.device)
        return decompose_scaled(weight_OI, statistic, rank, scale_I)
