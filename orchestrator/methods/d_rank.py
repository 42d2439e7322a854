"""D-Rank: layer-wise dynamic ranks over shared bases (arXiv 2509.25622)."""

from dataclasses import dataclass
from typing import ClassVar

from orchestrator.methods.basis_sharing import BasisSharing


@dataclass(frozen=True, slots=True)
class DRank(BasisSharing):
    """Basis Sharing's decomposition with ranks by effective rank (`allocate.d_rank`).

    The default is one block a group, the paper's own setting for grouped-query models, where a
    group would take from each k and v more rank than it gives. Coefficients are refitted from 40 %
    removed on, by one pass through the compressed model, as in the paper.
    """

    name: ClassVar[str] = "d-rank"
    allocation: ClassVar[str] = "d-rank"

    group: int = 1
    """Blocks that share a basis, counted from block 0; 1 shares none."""
