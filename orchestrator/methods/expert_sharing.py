"""Bases shared by the experts of a block (after MoLAE 2503.23100 and Sub-MoE 2506.23266)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.methods.svd_llm import REFIT
from orchestrator.methods.two_sided import TwoSided
from orchestrator.plan.grouping import DOWN, Grouping
from orchestrator.recipe.options import check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSharing(TwoSided):
    """`two-sided`, with one basis for gates and ups of all experts of a block, and one for downs.

    Gates and ups read the residual stream: `W_e = A_e B` with a basis of inputs B [R, H] for all.
    Downs write to it: `W_e = B A_e` with a basis of outputs B [H, R]. A block of E experts of I
    inner values stores `R (H + 2 E I)` and `R (H + E I)` values in place of `2 E I H` and `E I H`,
    so that ranks up to nearly H save values, where factors of its own save them for an expert
    below `I H / (I + H)` alone. Other linears are those of `two-sided`.

    Each basis is the best one of its rank for the joint linear (`linalg.joint`), in the norm of
    its curvature C and of its inputs. For downs that is `Σ trace(C D_e H_e D_eᵀ)`: each expert has
    inputs of its own, the second moment H_e, and all have the C of their outputs. For gates and ups
    it is `Σ trace(C_e D_e H D_eᵀ)`: each has its own C_e, and all have the inputs of all; left
    factors are fitted to the inputs of their expert by `refit`.

    Sources: MoLAE factors gates, ups and downs of all experts so; its conversion of a model has no
    calibration. Sub-MoE takes the left factors of experts side by side, within a cluster whose
    right factors it then merges. No authors' code was read. The norms are those of `two-sided`.
    """

    name: ClassVar[str] = "expert-sharing"
    source: ClassVar[str] = "arXiv 2503.23100, 2506.23266"
    departure: ClassVar[str] = (
        "Bases are calibrated, in the norms of `two-sided`, where MoLAE has no calibration; "
        "experts are not clustered, as in Sub-MoE."
    )
    use: ClassVar[str] = (
        "For experts that are used evenly, with `expert-sharing.refit=always`; else `two-sided`."
    )

    refit: Literal["never", "above_forty", "always"] = "never"
    """Condition of a refit of left factors to the compressed model's inputs, with the basis kept;
    `above_forty`: if 40 % or more of the values are removed. A basis of outputs stays."""

    def __post_init__(self) -> None:
        TwoSided.__post_init__(self)
        check_choice(f"{self.name}: refit", self.refit, REFIT)

    def refits(self, keep: float) -> bool:
        return self.refit == "always" or (self.refit == "above_forty" and keep <= 0.6)

    @property
    def grouping(self) -> Grouping:
        return Grouping(experts=(("gate", "up"), (DOWN,)))
