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
        """Give a dense module the product of the factors of a rank, and the bias that they have.

        The product is in float32 at least, and cast to the dtype of the weight.
        """
        weight_OI, bias = dense_weight(module), module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        cut = cls(module, weight_OI.clone(), bias)
        dtype = torch.promote_types(weight_OI.dtype, torch.float32)
        weight_OR = decompositions.factor(linear, "weight", rank).to(dtype)
        down_RI = decompositions.factor(linear, "down", rank).to(dtype)
        weight_OI.copy_(weight_OR @ down_RI)
        bias_O = decompositions.bias(linear, rank)
        if bias_O is not None:
            own = nn.Parameter(bias_O.to(weight_OI), requires_grad=False)
            module.register_parameter("bias", own)
        return cut

    def restore(self) -> None:
        """Give the module back the weight and the bias of the dense model."""
        dense_weight(self.module).copy_(self.whole_OI)
        self.module.register_parameter("bias", self.bias)
