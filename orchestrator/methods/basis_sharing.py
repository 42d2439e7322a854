"""Basis Sharing: one basis for several blocks (Wang et al., ICLR 2025, arXiv 2410.03765)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.methods.svd_llm import SvdLlm
from orchestrator.plan.grouping import SHARED, Grouping
from orchestrator.recipe.options import check_whole


@dataclass(frozen=True, slots=True)
class BasisSharing(SvdLlm):
    """SVD-LLM's decomposition of the same linear of `group` consecutive blocks, stacked.

    With W the weights on top of each other, [n m, k], and H the sum of their inputs' second
    moments, `W' = U_r U_rᵀ W` as in SVD-LLM: the basis `U_rᵀ W` [r, k] is stored once, with the
    group's first linear, and each linear keeps its own rows of U_r. Of all shared bases of r
    vectors it loses least on the sum of the moments. Ranks are those of the joint linear: uniform
    gives `floor(kept n m k / (n m + k))`.

    Departures from the authors' code: a shorter last group gets its own rank, where theirs reuses
    the others' and is over budget; no Cholesky factor and no inverse.
    """

    name: ClassVar[str] = "basis-sharing"
    source: ClassVar[str] = "arXiv 2410.03765"
    departure: ClassVar[str] = (
        "A shorter last group has a rank of its own; no Cholesky factor and no inverse."
    )
    use: ClassVar[str] = "To compare with: close to `svd-llm` in our results."
    allocation: ClassVar[str] = "uniform"

    group: int = 2
    """Blocks that share a basis, counted from block 0; 1 shares none."""
    refit: Literal["never", "above_forty", "always"] = "above_forty"
    """Condition of a refit, as in `SvdLlm`; the paper refits from 40 % removed on."""

    def __post_init__(self) -> None:
        SvdLlm.__post_init__(self)
        check_whole(f"{self.name}: group", self.group, 1, 1000)

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.group, SHARED if self.group > 1 else ())
