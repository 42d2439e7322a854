"""D-Rank: layer-wise dynamic ranks over shared bases (arXiv 2509.25622)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.methods.basis_sharing import BasisSharing


@dataclass(frozen=True, slots=True)
class DRank(BasisSharing):
    """Basis Sharing's decomposition with ranks by effective rank (`allocate.d_rank`).

    The default is one block a group, the paper's own setting for grouped-query models, where a
    group would take from each k and v more rank than it gives.

    The paper refits coefficients from 40 % removed on, by one pass through the compressed model
    (`refit = "above_forty"`). Here that is left to who asks for it: with 32 calibration windows of
    512 tokens it raised the perplexity of SmolLM2-135M at 0.6 kept on held-out text by 10 %.
    """

    name: ClassVar[str] = "d-rank"
    source: ClassVar[str] = "arXiv 2509.25622"
    departure: ClassVar[str] = (
        "Ranks are the optimum over integers, and no factor is refitted; `d-rank.setting`, "
        "`d-rank.beta` and `d-rank.refit` restore the paper's."
    )
    use: ClassVar[str] = "To compare with: `svd-llm` lost less in our results."
    allocation: ClassVar[str] = "d-rank"

    group: int = 1
    """Blocks that share a basis, counted from block 0; 1 shares none."""
    refit: Literal["never", "above_forty", "always"] = "never"
    """Condition of a refit, as in `SvdLlm`."""
