"""D-Rank: layer-wise dynamic ranks (arXiv 2509.25622), without shared bases."""

from dataclasses import dataclass

from orchestrator.methods.svd_llm import SvdLlm


@dataclass(frozen=True, slots=True)
class DRank(SvdLlm):
    """SVD-LLM's decomposition with ranks by effective rank (`allocate.d_rank`).

    Groups are of one block (n = 1), the paper's own setting for grouped-query models; its shared
    bases over several blocks, and its refit of coefficients from 40 % removed on, are not here.
    """

    name: str = "d-rank"
    allocation: str = "d-rank"
