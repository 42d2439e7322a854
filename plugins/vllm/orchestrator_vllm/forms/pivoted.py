# Copy of orchestrator/models/forms/pivoted.py, by scripts/vendor_forms.py; change that file.
"""R rows of a weight of rank R, and its other rows as combinations of those.

Shape suffixes: O outputs, I inputs, R rank, S = O - R.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orchestrator_vllm.forms.base import FormTensor, Pivot, StoredForm
from orchestrator_vllm.forms.low_rank import LowRankLinear


class _InOrder(torch.autograd.Function):
    """Columns in the order of a permutation; the backward pass applies the inverse permutation.

    Both passes gather. The backward pass of `index_select` adds into zeros, on a GPU in no fixed
    order or, under strict algorithms, after a sort; and a CPU takes 3 to 8 times as long to select
    columns as to gather them.
    """

    @staticmethod
    def forward(values: Tensor, index_O: Tensor) -> Tensor:
        return values.gather(-1, index_O.expand(values.shape))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_O,) = ctx.saved_tensors
        return _in_order(grad, index_O.argsort()), None


def _in_order(values: Tensor, index_O: Tensor) -> Tensor:
    """Columns of values [..., O] in the order of a permutation, int64."""
    if not values.requires_grad:
        return values.gather(-1, index_O.expand(values.shape))
    ordered: Tensor = _InOrder.apply(values, index_O)  # type: ignore[no-untyped-call]
    return ordered


class PivotedLinear(LowRankLinear):
    """A linear whose weight is R of its own rows, and the other rows as combinations of those.

    With z = x down^T the outputs are [z, z weight^T] in the order that `index` says, + bias.
    `weight` is [O - R, R], `down.weight` [R, I], R < min(O, I), `index` [O], int32: where each
    output stands among the pivots and the others. R (O + I) - R^2 stored values and as many
    multiplications a token.
    """

    form = "pivoted"
    fields = ("rank",)
    optional = ()
    # the rows have an order of their own
    split_outputs = "whole"
    stored_with_values = ("index",)

    index: Tensor

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
        super().__init__(in_features, out_features, rank, bias=bias, device=device, dtype=dtype)
        weight_SR = torch.empty(out_features - rank, rank, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight_SR)
        index_O = torch.empty(out_features, device=device, dtype=torch.int32)
        self.register_buffer("index", index_O)

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
        """Combinations, pivots, and the order of both."""
        rank = stored.rank
        return (
            FormTensor(name="weight", part="others", shape=(out_features - rank, rank)),
            FormTensor(name="down.weight", part="pivots", shape=(rank, in_features)),
            FormTensor(name="index", part="order", shape=(out_features,), dtype=torch.int32),
        )

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Ranks below the smaller side fit; they save values at every one of them."""
        most = min(out_features, in_features) - 1
        if stored.rank <= most:
            return ""
        linear = f"a [{out_features}, {in_features}] linear"
        return f"found rank {stored.rank}, pivoted {linear} takes 1 to {most}"

    def forward(self, input: Tensor) -> Tensor:
        pivots = self.down(input)
        outputs = torch.cat([pivots, linear(pivots, self.weight)], dim=-1)
        ordered = _in_order(outputs, self.index.long())
        return ordered if self.bias is None else ordered + self.bias

    def dense_weight(self) -> Tensor:
        """The rows [O, I] in their order, in the values' dtype."""
        rows_OI = torch.cat([self.down.weight, self.weight @ self.down.weight])
        return rows_OI.index_select(0, self.index)

    def left_factor(self) -> Tensor:
        """The left factor [O, R]: rows of the identity and of `weight` in the outputs' order."""
        weight_SR = self.weight.detach()
        eye_RR = torch.eye(self.rank, dtype=weight_SR.dtype, device=weight_SR.device)
        return torch.cat([eye_RR, weight_SR]).index_select(0, self.index)

    @torch.no_grad()
    def set_factors(
        self, left_OR: Tensor | None, right_RI: Tensor, *, pivot: Pivot
    ) -> dict[str, Tensor]:
        """Store factors in place; new left ones have other pivots, so that all tensors change."""
        if left_OR is None:
            return super().set_factors(None, right_RI, pivot=pivot)
        weight_SR, pivots_RI, order_O = pivot(left_OR, right_RI)
        changed = super().set_factors(weight_SR, pivots_RI, pivot=pivot)
        return changed | {"index": self.index.copy_(order_O)}

    @property
    def indexed(self) -> str:
        """Description of what a sound index names, for messages."""
        return f"each of {self.out_features} outputs once"

    def is_sound(self) -> bool:
        """True if the index names every place once."""
        places_O = torch.arange(self.out_features, device=self.index.device)
        return torch.equal(self.index.long().sort().values, places_O)
