"""SVD-LLM: truncation-aware whitening (Wang et al., ICLR 2025, arXiv 2403.07378)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram, decompose
from orchestrator.plan import Linear


@dataclass(frozen=True, slots=True)
class SvdLlm:
    """The truncated SVD of W H^(1/2), H the second moment of the linear's inputs.

    Of all matrices W' of rank r it minimises Σ |W x - W' x|² over the calibration tokens; each
    squared singular value that is cut adds itself to that sum.

    Departures from the authors' code: no Cholesky factor and no inverse (`W' = U_r U_rᵀ W`, the
    same matrix where H is well conditioned, and defined where it is not); float64 sums; every
    linear is decomposed on inputs of the dense model, as in the paper's first stage. The paper's
    least-squares update is not part of this method.

    Left open by the paper: the calibration text and its length, which the recipe names.
    """

    name: str = "svd-llm"
    version: int = 1
    allocation: str = "uniform"

    def side(self, linear: Linear) -> Literal["input", "output"]:
        """The output Gram where it is smaller: the left singular vectors need no more."""
        return "output" if linear.in_features > linear.out_features else "input"

    def decompose(self, weight_OI: Tensor, statistic: InputGram | OutputGram, rank: int) -> LowRank:
        return decompose(weight_OI, statistic, rank)
