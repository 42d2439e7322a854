"""Bases shared by the experts of a block (after MoLAE 2503.23100 and Sub-MoE 2506.23266)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from orchestrator.methods.two_sided import TwoSided
from orchestrator.plan.grouping import DOWN, Grouping
from orchestrator.recipe.options import check_choice

BASES = ("apart", "together")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSharing(TwoSided):
    """`two-sided` with one basis for the linears of all experts of a block."""

    name: ClassVar[str] = "expert-sharing"
    source: ClassVar[str] = "arXiv 2503.23100, 2506.23266"

    gate_and_up: Literal["apart", "together"] = "apart"
    """Basis of gate and of up: one for each, or one for both."""

    def __post_init__(self) -> None:
        TwoSided.__post_init__(self)
        check_choice(f"{self.name}: gate_and_up", self.gate_and_up, BASES)

    @property
    def grouping(self) -> Grouping:
        first = (("gate",), ("up",)) if self.gate_and_up == "apart" else (("gate", "up"),)
        return Grouping(experts=(*first, (DOWN,)))
