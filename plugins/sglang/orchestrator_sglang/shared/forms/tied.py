# Copy of orchestrator/models/forms/tied.py, by scripts/vendor_forms.py; change that file.
"""Dense weight that several linears of experts use.

Shape suffixes: O outputs, I inputs.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orchestrator_sglang.shared.forms.base import FormLinear, FormTensor, StoredForm


class TiedLinear(FormLinear):
    """A linear with a dense weight that others use too: `y = x weight^T + bias`.

    `weight` [O, I] is stored once, with the first linear of a cluster, to which those of the others
    are tied. Each has its own bias. O I multiplications a token, as of the dense linear. The
    product is rounded before the bias is added, as in `Experts`.

    The weight has the dense shape. A program that does not know the form still stops, at the guard
    of the experts.
    """

    form = "tied"
    fields: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("basis",)
    basis_tensor: ClassVar[str] = "weight"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight_OI = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight_OI)
        bias_O = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(bias_O) if bias else None)

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
        return cls(in_features, out_features, **options)

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """The weight, a mean of dense ones; an empty tuple if it is another linear's."""
        shape = (out_features, in_features)
        return () if stored.basis else (FormTensor(name="weight", part="mean", shape=shape),)

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """An empty text: a linear of any size can use the weight of another of its size."""
        return ""

    def forward(self, input: Tensor) -> Tensor:
        product = linear(input, self.weight)
        return product if self.bias is None else product + self.bias

    def dense_weight(self) -> Tensor:
        """The weight [O, I], without gradients."""
        return self.weight.detach()

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Return an empty tuple: an adapter of one linear would change the weight of all."""
        return ()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
