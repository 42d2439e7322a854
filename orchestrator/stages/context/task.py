"""Task of the workers of a compression: plain values, and the unit keys that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from orchestrator.methods.base import Method
from orchestrator.plan.forms import Form
from orchestrator.plan.grouping import Grouping
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Task
from orchestrator.store.places import Place
from orchestrator.store.units import unit_key

PIVOT_VERSION = 1
"""Raised when pivoted factors change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionTask(Task):
    """Task that the workers of one compression share."""

    model: Place
    out: Place
    method: Method
    dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    linears: tuple[Linear, ...]
    """The targeted linears."""
    form: Form
    """Form of those that are cut."""
    grouping: Grouping
    tokens_key: str
    block_keys: Mapping[int, str]
    """Keys of the units of decompositions, by the first block of each group of blocks."""
    block_cosines: bool = False
    """True if the cosine of every block's input and output is computed."""
    refit_keys: Mapping[int, str] = field(default_factory=dict)
    """Keys of the units of refitted left factors, by block; empty if there are none."""
    order_keys: Mapping[int, str] = field(default_factory=dict)
    """Keys of the units of learned scores, by block, in whose order directions are kept; empty if
    the first ones are."""
    gain_keys: Mapping[int, str] = field(default_factory=dict)
    """Keys of the units of gains, by block, by which left factors of directions are multiplied."""
    settings: Any = None
    """Settings of the stage, of the type that its worker class takes."""
    _by_name: Mapping[str, Linear] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # tensors of thousands of experts each look their linear up
        object.__setattr__(self, "_by_name", {each.name: each for each in self.linears})

    def linear(self, name: str) -> Linear:
        """Return the targeted linear of this name."""
        return self._by_name[name]

    def of_groups(self, first_blocks: Sequence[int]) -> list[Linear]:
        """Return the linears of the groups of blocks that begin with these blocks."""
        return [each for each in self.linears if self.grouping.first(each.block) in first_blocks]

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """Return which Gram a linear needs; only input Grams can be summed for a shared basis."""
        if self.grouping.joins(linear):
            return "input"
        return self.method.side(linear, site)

    def output_curvature(self, linear: Linear) -> bool:
        """Return True if gradients of a linear's outputs are gathered as they are."""
        return self.method.output_curvature or self.grouping.shares_outputs(linear)

    def made_by(self, linear: Linear) -> list[str]:
        """Return the keys of the units that a linear's factors are made of."""
        later = [
            keys[linear.block]
            for keys in (self.order_keys, self.refit_keys, self.gain_keys)
            if linear.block in keys
        ]
        return [self.block_keys[self.grouping.first(linear.block)], *later]

    def pivoted_key(self, linear: Linear, rank: int) -> str:
        """Return the key of the unit of a linear's pivoted factors."""
        return unit_key("pivot", PIVOT_VERSION, self.made_by(linear), linear=linear.name, rank=rank)
