# Copy of orchestrator/models/forms/pivoted.py, by scripts/vendor_forms.py; change that file.
"""R rows of a weight of rank R, and its other rows as combinations of those.

Shape suffixes: O outputs, I inputs, R rank, S = O - R.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orchestrator_sglang.shared.forms.base import FormTensor, Pivot, StoredForm
from orchestrator_sglang.shared.forms.low_rank import LowRankLinear


class _InOrder(torch.autograd.Function):
    """Columns in the order of a permutation; the backward pass applies the inverse permutation.

    The backward pass of `index_select` would add into zeros, on a GPU in no fixed order or, under
    strict algorithms, after a sort.
    """

    @staticmethod
    def forward(values: Tensor, index_O: Tensor) -> Tensor:
        return _selected(values, index_O)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_O,) = ctx.saved_tensors
        return _in_order(grad, index_O.argsort()), None


def _in_order(values: Tensor, index_O: Tensor) -> Tensor:
    """Columns of values [..., O] in the order of a permutation."""
    if not values.requires_grad:
        return _selected(values, index_O)
    ordered: Tensor = _InOrder.apply(values, index_O)  # type: ignore[no-untyped-call]
    return ordered


def _selected(values: Tensor, index_O: Tensor) -> Tensor:
    """Columns of values [..., O] by an index, without gradients.

    On a CPU, with 1024 rows of 5632 columns and one thread, `index_select` takes 10 ms of float32
    and 27 ms of bfloat16, and `gather` 17 and 22 ms, or 10 ms of the latter as whole numbers.
    """
    if _is_half_on_cpu(values):
        bits = values.view(torch.int16)
        return bits.gather(-1, index_O.long().expand(bits.shape)).view(values.dtype)
    return values.index_select(-1, index_O)


def _is_half_on_cpu(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.element_size() == 2


def _is_bare(module: nn.Module) -> bool:
    """True for a linear whose call is the product with its weight alone."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    is_linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_linear and not any(hooks) and "forward" not in vars(module)


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
        """Without gradients both products are written to slices of one output, in the same bits:
        the pivots are then copied once, into their order."""
        if not torch.is_grad_enabled() and self._writes_slices(input):
            return self._inferred(input)
        pivots = self.down(input)
        return self._ordered(pivots, linear(pivots, self.weight))

    def _gated(self, gate: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """The directions of `weight` alone are scaled, not the pivots."""
        pivots = self.down(input)
        return self._ordered(pivots, linear(gate(pivots), self.weight))

    def _ordered(self, pivots: Tensor, others: Tensor) -> Tensor:
        ordered = _in_order(torch.cat([pivots, others], dim=-1), self.index)
        return ordered if self.bias is None else ordered + self.bias

    def _writes_slices(self, input: Tensor) -> bool:
        """True if products are plain: no cast, no adapter or hook, and no compiler, which writes
        slices by itself.

        A CPU's products of 16-bit values read beyond the rows of a slice, and what they find there
        is multiplied by zero: not a number stays one.
        """
        return (
            not _is_half_on_cpu(input)
            and _is_bare(self.down)
            and type(input) is Tensor
            and type(self.weight) is nn.Parameter
            and not torch.compiler.is_compiling()
            and not input.is_meta  # has no autocast to ask for
            and not torch.is_autocast_enabled(input.device.type)
        )

    def _inferred(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        outputs = rows.new_empty(len(rows), self.out_features)
        pivots = outputs[:, : self.rank]
        torch.mm(rows, self.down.weight.t(), out=pivots)
        torch.mm(pivots, self.weight.t(), out=outputs[:, self.rank :])
        ordered = _selected(outputs, self.index)
        if self.bias is not None:
            ordered += self.bias
        return ordered.view(*input.shape[:-1], self.out_features)

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
