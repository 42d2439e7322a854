"""SVD-LLM: truncation-aware whitening (Wang et al., ICLR 2025, arXiv 2403.07378)."""

from collections.abc import Sequence
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
    decomposition: str = "whitened-svd"
    version: int = 1
    allocation: str = "uniform"

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """The output Gram where no linear of the site needs H and it is smaller than H.

        The left singular vectors need no more. Where H is there anyway it is the better one: its
        products of inputs are rounded once, those of outputs twice.
        """
        narrow = all(each.in_features > each.out_features for each in site)
        smaller = sum(each.out_features**2 for each in site) < linear.in_features**2
        return "output" if narrow and smaller else "input"

    def decompose(self, weight_OI: Tensor, statistic: InputGram | OutputGram, rank: int) -> LowRank:
        return decompose(weight_OI, statistic, rank)
