# Copy of orchestrator/models/forms/dropped.py, by scripts/vendor_forms.py; change that file.
"""Linears of an expert that is gone: no tensor, outputs of 0."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from orchestrator_vllm.forms.base import FormLinear, FormTensor, StoredForm


class DroppedLinear(FormLinear):
    """Linear without weight and bias: its outputs are 0, whatever its inputs.

    `weight` is None, by which `Experts` knows the expert and does not call it; the guard of its
    block says that it is gone, so that a program without this class stops.
    """

    form = "dropped"
    fields: ClassVar[tuple[str, ...]] = ()
    keeps_bias: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @classmethod
    def make(
        cls,
        stored: StoredForm,
        in_features: int,
        out_features: int,
        *,
        shares_basis: bool,
        **options: Any,
    ) -> Self:
        return cls(in_features, out_features)

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """Return an empty tuple."""
        return ()

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Return an empty text: a linear of any size can go; `config.misfits` checks that the
        others of its expert do, too."""
        return ""

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """Return zeros [O, I] in float32, on the CPU."""
        return torch.zeros(self.out_features, self.in_features)

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Return an empty tuple: an adapter would bring the expert back."""
        return ()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
