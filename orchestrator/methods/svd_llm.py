"""SVD-LLM: truncation-aware whitening (Wang et al., ICLR 2025, arXiv 2403.07378)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.methods.base import Method
from orchestrator.recipe.options import check_choice

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram

REFIT = ("never", "above_forty", "always")


@dataclass(frozen=True, slots=True)
class SvdLlm(Method):
    """The truncated SVD of W H^(1/2), H the second moment of the linear's inputs.

    Of all matrices W' of rank r it minimises Σ |W x - W' x|² over the calibration tokens; each
    squared singular value that is cut adds itself to that sum.

    Departures from the authors' code: no Cholesky factor and no inverse (`W' = U_r U_rᵀ W`, the
    same matrix where H is well conditioned, and defined where it is not); float64 sums; every
    linear is decomposed on inputs of the dense model, as in the paper's first stage. The paper's
    least-squares update of the left factors is the option `refit`; here one pass through the
    compressed model serves all linears, where theirs walks the blocks in order, each updated before
    the next is calibrated.

    Left open by the paper: the calibration text and its length, which the recipe names.
    """

    name: ClassVar[str] = "svd-llm"
    source: ClassVar[str] = "arXiv 2403.07378"
    departure: ClassVar[str] = (
        "Sums in float64, no Cholesky factor and no inverse; the update of left factors is the "
        "option `refit`, after one pass for all blocks."
    )
    use: ClassVar[str] = (
        "Without gradients, in one forward pass; with `--refine in_order` it is AA-SVD."
    )
    decomposition: ClassVar[str] = "whitened-svd"

    refit: Literal["never", "above_forty", "always"] = "never"
    """Condition of a refit of left factors to the compressed model's inputs, with the basis kept;
    `above_forty`: if 40 % or more of the values are removed."""

    def __post_init__(self) -> None:
        check_choice(f"{self.name}: refit", self.refit, REFIT)

    def refits(self, keep: float) -> bool:
        return self.refit == "always" or (self.refit == "above_forty" and keep <= 0.6)

    def decompose(
        self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int
    ) -> "LowRank":
        from orchestrator.linalg.low_rank import decompose

        return decompose(weight_OI, statistic, rank)
