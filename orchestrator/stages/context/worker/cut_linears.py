"""Linears of the dense model that have a cut in their place for a while, as trials of plans need.

Shape suffixes: O outputs, I inputs, R rank.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.plan.linear import Linear
from orchestrator.stages.context.worker.stored import Decompositions


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """Return the bias of a dense module, to be given back by `register_parameter`."""
    bias = module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return bias


def put_cut(module: nn.Module, linear: Linear, rank: int, decompositions: Decompositions) -> None:
    """Give a dense module the product of the factors of a rank, and the bias that they have.

    The product is in float32 at least, and cast to the dtype of the weight.
    """
    weight_OI = dense_weight(module)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_OR = decompositions.factor(linear, "weight", rank).to(dtype)
    down_RI = decompositions.factor(linear, "down", rank).to(dtype)
    weight_OI.copy_(weight_OR @ down_RI)
    bias_O = decompositions.bias(linear, rank)
    if bias_O is not None:
        own = nn.Parameter(bias_O.to(weight_OI), requires_grad=False)
        module.register_parameter("bias", own)


@dataclass(frozen=True, slots=True)
class CutLinear:
    """A module that multiplies by a cut, and what it had before; memory: its dense weight."""

    module: nn.Module
    whole_OI: Tensor
    bias: nn.Parameter | None

    @classmethod
    def put(
        cls, module: nn.Module, linear: Linear, rank: int, decompositions: Decompositions
    ) -> Self:
        """Put a cut in the place of a dense weight, as `put_cut`, and keep that."""
        cut = cls(module, dense_weight(module).clone(), bias_of(module))
        put_cut(module, linear, rank, decompositions)
        return cut

    def restore(self) -> None:
        """Give the module back the weight and the bias of the dense model."""
        dense_weight(self.module).copy_(self.whole_OI)
        self.module.register_parameter("bias", self.bias)
