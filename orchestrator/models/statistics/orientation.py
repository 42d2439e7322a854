"""Weights of linears as [outputs, inputs], whatever layer stores them."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of an `nn.Linear` or `Conv1D` as [outputs, inputs]; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return as_dense(module, weight.detach())


def as_dense(module: nn.Module, weight: Tensor) -> Tensor:
    """Transpose a weight stored for this module to [outputs, inputs] if necessary; a view."""
    return weight.T if isinstance(module, Conv1D) else weight
