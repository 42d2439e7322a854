"""GRASP: singular directions by the gradient of the loss (arXiv 2501.00339)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from orchestrator.methods.base import Method
from orchestrator.methods.kinds.low_rank import ORDERED, ScaledKind
from orchestrator.recipe.options import check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.gradients import DirectionGradients
    from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram

LEAST_VALUE = 1e-7
"""Smallest singular value, as a fraction of the largest, that an importance is divided by; those
below it are rounding noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grasp(Method):
    """The plain SVD of W, its directions in the order of |S ∂L/∂S|, L the loss on the text.

    With a gate s_i = 1 on direction i, h_i = ∂L/∂s_i = S_i ∂L/∂S_i = u_iᵀ G Wᵀ u_i, G the gradient
    of the weight. Its importance is Σ h² over calibration sequences (`aggregate` `square`), the
    diagonal of the empirical Fisher information of the gates: to second order, and with directions
    taken as independent, cutting it costs half of that in nats. As published (`signed`) it is
    |Σ h|, the first-order change of the loss on the whole text. Kept directions are unchanged:
    W' = U_r U_rᵀ W with U_r the r most important left singular vectors.

    Curves are in the unit of the importance, which is not the norm of the outputs: what a cut loses
    of these is in the report alone. `square` and `taylor` compare linears of the whole model, so
    that `threshold` divides one budget over all blocks; the allocation `grasp` cuts the most
    redundant blocks alone, as published.

    Cost: one forward pass, and one backward pass with T (O I + 2 K²) multiply-adds for each linear,
    K = min(O, I); a [K, K] basis of every linear of the open blocks is held.

    After the authors' code (739125c). Departures: `signed` sums are of a sequence's summed loss,
    where theirs are of its mean, a common factor for windows of equal length; all gradients are of
    the dense model at once, where theirs are taken again after each cut, from the last redundant
    block to the first; biases stay; labels are the next token (`next`), where the code's are the
    one after it (`after_next`), since its loader and the model both shift them. Factors are U and
    Uᵀ W, with the same product.
    """

    name: ClassVar[str] = "grasp"
    source: ClassVar[str] = "arXiv 2501.00339"
    departure: ClassVar[str] = (
        "Squares of gradients are summed over sequences, of the next token, and of the dense model "
        "at once; `grasp.aggregate` and `grasp.labels` restore the published sum and labels."
    )
    use: ClassVar[str] = (
        "To cut few redundant blocks deeply, as published; with `--allocation threshold` to divide "
        "one budget by gradients. `two-sided` lost far less in our results."
    )
    allocation: ClassVar[str] = "grasp"
    block_cosines: ClassVar[bool] = True
    gradient: ClassVar[Literal["curvature", "weight", "directions"]] = "directions"

    importance: Literal["taylor", "gradient"] = "taylor"
    """|S ∂L/∂S|, or |∂L/∂S|, which favours directions with small singular values."""
    aggregate: Literal["square", "signed"] = "square"
    """Sum over sequences of squares, or the magnitude of the sum."""
    labels: Literal["next", "after_next"] = "next"
    """Token of the text whose loss it is."""

    def __post_init__(self) -> None:
        check_choice("grasp: importance", self.importance, ("taylor", "gradient"))
        check_choice("grasp: aggregate", self.aggregate, ("square", "signed"))
        check_choice("grasp: labels", self.labels, ("next", "after_next"))

    @property
    def kind(self) -> ScaledKind[Any]:
        return ORDERED

    @property
    def label_draws(self) -> int:
        return 1

    @property
    def decomposition(self) -> str:
        return f"grasp importance={self.importance} aggregate={self.aggregate}"

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "LowRank":
        from orchestrator.linalg.gradients import DirectionGradients
        from orchestrator.linalg.scaled import decompose_in_order

        found = statistic.gradient
        if not isinstance(found, DirectionGradients):
            raise ValueError("grasp needs the gradients of directions beside a Gram")
        return decompose_in_order(
            weight_OI,
            statistic,
            rank,
            left_OK=found.left(),
            energies_K=self._importances(found),
        )

    def _importances(self, found: "DirectionGradients") -> "Tensor":
        """Return the importance of every direction, float64 [K]."""
        import torch

        importance_K = found.square_K if self.aggregate == "square" else found.sum_K.abs()
        if self.importance == "taylor":
            return importance_K
        value_K = found.value_K
        scale_K = value_K.square() if self.aggregate == "square" else value_K
        is_known_K = value_K > LEAST_VALUE * value_K.max()
        return torch.where(is_known_K, importance_K / scale_K.clamp(min=1e-300), 0.0)
