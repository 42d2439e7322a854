# Copy of orchestrator/models/forms/output_basis.py, by scripts/vendor_forms.py; change that file.
"""Two factors in the place of a dense weight, with an output basis that several linears share.

Shape suffixes: O outputs, I inputs, R rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orchestrator_sglang.shared.forms.base import (
    FormLinear,
    FormTensor,
    ParameterScales,
    Split,
    StoredForm,
)


class OutputBasisLinear(FormLinear):
    """A linear whose weight is a product of two factors: `y = (x down^T) weight^T + bias`.

    `weight` [O, R] is the output basis, which linears that write to one place share: tied, and
    stored once. `down.weight` [R, I] is the linear's own. n such linears store R (O + n I) values,
    against n O I dense ones, and take R (O + I) multiplications a token each.
    """

    form = "output_basis"
    fields: ClassVar[tuple[str, ...]] = ("rank",)
    optional: ClassVar[tuple[str, ...]] = ("basis",)
    basis_tensor: ClassVar[str] = "weight"
    split_inputs: ClassVar[Split] = "parts"
    parts: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
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
        return cls(in_features, out_features, stored.rank, **options)

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """The factors; a basis that is another linear's is left out."""
        weight = FormTensor(name="weight", part="weight", shape=(out_features, stored.rank))
        down = FormTensor(name="down.weight", part="down", shape=(stored.rank, in_features))
        return (down,) if stored.basis else (weight, down)

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Ranks below break-even fit, floor(O I / (O + I)), I the inputs of the whole group."""
        break_even = in_features * out_features // (in_features + out_features)
        if stored.rank < break_even:
            return ""
        size = f"linears of [{out_features}, {in_features}] together"
        return f"found rank {stored.rank}, {size} take 1 to {break_even - 1}"

    def forward(self, input: Tensor) -> Tensor:
        return linear(self.down(input), self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """The product [O, I], in the factors' dtype."""
        return self.weight @ self.down.weight

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The linear's own factor; an adapter of a shared basis would count for each linear."""
        return ("down",)

    def scales(self) -> Mapping[str, ParameterScales]:
        """A scale for each direction: a row of `down.weight`."""
        return {
            "down.weight": ParameterScales(
                count=self.rank,
                spread=lambda scale_R: scale_R[:, None],
                gather=lambda values_RI: values_RI.sum(dim=1),
                gated=self._gated,
            )
        }

    def _gated(self, gate: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        return linear(gate(self.down(input)), self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
