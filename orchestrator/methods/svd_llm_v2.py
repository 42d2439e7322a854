"""SVD-LLM v2: heterogeneous ratios by truncation loss (Wang et al., arXiv 2503.12340)."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.methods.svd_llm import SvdLlm


@dataclass(frozen=True, slots=True)
class SvdLlmV2(SvdLlm):
    """SVD-LLM's decomposition with kept fractions by theoretical loss (`allocate.svd_llm_v2`).

    The paper's second change, truncation by two SVDs instead of a Cholesky factor, gives the same
    matrix in exact arithmetic, and our decomposition already does without the factor.
    """

    name: ClassVar[str] = "svd-llm-v2"
    source: ClassVar[str] = "arXiv 2503.12340"
    departure: ClassVar[str] = (
        "One decomposition in place of two SVDs, equal to them in exact arithmetic; "
        "`svd-llm-v2.most_removed` bounds what one linear loses."
    )
    use: ClassVar[str] = "To compare with: no better than `svd-llm` in our results."
    allocation: ClassVar[str] = "svd-llm-v2"
