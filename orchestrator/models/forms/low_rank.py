"""Two factors in the place of a dense weight, and the basis that several linears share.

Shape suffixes: O outputs, I inputs, R rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import is_parametrized

from orchestrator.errors import InputError
from orchestrator.models.forms.base import (
    Factored,
    FormLinear,
    FormTensor,
    ParameterScales,
    Pivot,
    Split,
    StoredForm,
)


class SharedBasis(nn.Module):
    """The inner factor of linears that share one: `y = x weight^T`, `weight` [R, I] is tied.

    Not an `nn.Linear`, on purpose: a program that adapts those would give every linear an adapter
    of its own, and merging would then add all of them to the one tensor that they share.
    """

    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        in_features: int,
        rank: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Raises: InputError: something changes `weight` for this one of the linears alone."""
        if is_parametrized(self):
            raise InputError(
                "a basis that several linears share was adapted for one of them, which cannot be "
                "merged; adapt the linears' own factors, as recovery_targets(model, 'weight') does"
            )
        return linear(input, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class LowRankLinear(FormLinear):
    """A linear whose weight is a product of two factors: `y = (x down^T) weight^T + bias`.

    `weight` is [O, R], `down.weight` [R, I], R < I. R (O + I) stored values and as many
    multiplications a token, against O I of the dense linear. Linears that share a basis have one
    tied `down.weight`, which is stored once.
    """

    form = "low_rank"
    fields: ClassVar[tuple[str, ...]] = ("rank",)
    optional: ClassVar[tuple[str, ...]] = ("basis",)
    split_outputs: ClassVar[Split] = "weight"
    split_inputs: ClassVar[Split] = "parts"
    parts: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        shares_basis: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        weight_OR = torch.empty(out_features, rank, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight_OR)
        self.down: nn.Linear | SharedBasis = (
            SharedBasis(in_features, rank, device=device, dtype=dtype)
            if shares_basis
            else nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        )
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
        return cls(in_features, out_features, stored.rank, shares_basis=shares_basis, **options)

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """The factors; a basis that is another linear's is left out."""
        weight = FormTensor(name="weight", part="weight", shape=(out_features, stored.rank))
        down = FormTensor(name="down.weight", part="down", shape=(stored.rank, in_features))
        return (weight,) if stored.basis else (weight, down)

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Ranks below break-even fit, floor(O I / (O + I))."""
        break_even = in_features * out_features // (in_features + out_features)
        if stored.rank < break_even:
            return ""
        linear = f"a [{out_features}, {in_features}] linear"
        return f"found rank {stored.rank}, {linear} takes 1 to {break_even - 1}"

    def forward(self, input: Tensor) -> Tensor:
        return linear(self.down(input), self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """The product [O, I], in the factors' dtype."""
        return self.weight @ self.down.weight

    def factored(self) -> Factored | None:
        """This module, unless its basis is shared."""
        return None if isinstance(self.down, SharedBasis) else self

    def left_factor(self) -> Tensor:
        """The left factor [O, R]."""
        return self.weight.detach()

    def right_factor(self) -> Tensor:
        """The right factor [R, I]."""
        return self.down.weight.detach()

    def rest(self) -> Tensor | None:
        """The weight beside the product; see `Factored`."""
        return None

    @torch.no_grad()
    def set_factors(
        self, left_OR: Tensor | None, right_RI: Tensor, *, pivot: Pivot
    ) -> dict[str, Tensor]:
        """Store factors in place; see `Factored`."""
        self.down.weight.copy_(right_RI)
        changed: dict[str, Tensor] = {"down.weight": self.down.weight}
        if left_OR is not None:
            changed["weight"] = self.weight.copy_(left_OR)
        return changed

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Both factors; a shared basis has no adapter, which each of its linears would add to."""
        return ("weight",) if isinstance(self.down, SharedBasis) else ("weight", "down")

    def scales(self) -> Mapping[str, ParameterScales]:
        """A scale for each direction: a column of `weight`."""
        return {
            "weight": ParameterScales(
                count=self.rank,
                spread=lambda scale_R: scale_R,
                gather=lambda values_OR: values_OR.sum(dim=0),
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
