"""MGAA: multi-granular adaptive allocation (arXiv 2507.03294), a reconstruction."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.methods.svd_llm import SvdLlm


@dataclass(frozen=True, slots=True)
class Mgaa(SvdLlm):
    """SVD-LLM's decomposition with ranks by sublayer and by energy (`allocate.mgaa`).

    The paper presents its allocation as one that any low-rank method can use; which ones it was
    tried with is not public, so the host is ours to name: the whitened SVD. Its formula from
    cosine to kept fraction is not public either; see the allocator for the rules to choose from.
    """

    name: ClassVar[str] = "mgaa"
    source: ClassVar[str] = "arXiv 2507.03294"
    departure: ClassVar[str] = (
        "A reconstruction: neither the paper's formula from cosine to kept fraction nor the "
        "method that it was tried with is public."
    )
    use: ClassVar[str] = "Without gradients: of such low-rank methods it lost least in our results."
    allocation: ClassVar[str] = "mgaa"
