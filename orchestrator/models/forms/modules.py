"""The modules that stand in the place of a dense linear, one for each form.

Every one keeps under the name `weight` a tensor that cannot have the dense weight's shape, on
purpose: a program that does not know the form finds the wrong shape and stops, where a missing
tensor would have been filled with random values. None is an `nn.Linear`: programs that look for
those take `weight` for the dense matrix. Values are parameters in one dtype, indices are buffers
of whole numbers that no cast of the model changes.

Shape suffixes: O outputs, I inputs, R rank, S = O - R, N nonzeros.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrize import is_parametrized

from orchestrator.errors import InputError
from orchestrator.models.forms.index_codes import index_tensors, is_sound, materialize


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


class LowRankLinear(nn.Module):
    """A linear whose weight is a product of two factors: `y = (x down^T) weight^T + bias`.

    `weight` is [O, R], `down.weight` [R, I], R < I. R (O + I) stored values and as many
    multiplications a token, against O I of the dense linear. Linears that share a basis have one
    tied `down.weight`, which is stored once.
    """

    # transformers then hands local tensors, not DTensors, to `forward` under tensor parallelism
    _hf_quantized_needs_local_tp = True

    bias: nn.Parameter | None

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

    def forward(self, input: Tensor) -> Tensor:
        return linear(self.down(input), self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """The product [O, I], in the factors' dtype."""
        return self.weight @ self.down.weight

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


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

    def forward(self, input: Tensor) -> Tensor:
        pivots = self.down(input)
        outputs = torch.cat([pivots, linear(pivots, self.weight)], dim=-1)
        ordered = _in_order(outputs, self.index.long())
        return ordered if self.bias is None else ordered + self.bias

    def dense_weight(self) -> Tensor:
        """The rows [O, I] in their order, in the values' dtype."""
        rows_OI = torch.cat([self.down.weight, self.weight @ self.down.weight])
        return rows_OI.index_select(0, self.index)

    @property
    def indexed(self) -> str:
        """What a sound index names, in words."""
        return f"each of {self.out_features} outputs once"

    def is_sound(self) -> bool:
        """Whether the index names every place once."""
        places_O = torch.arange(self.out_features, device=self.index.device)
        return torch.equal(self.index.long().sort().values, places_O)


class SparseLinear(nn.Module):
    """A linear of which N entries are stored: `weight` [N], and the code that says where they are.

    Saves disk and memory, not time: every forward pass writes the dense weight [O, I] anew and
    multiplies with it. The dense weight lives as long as the multiplication, or, where the input
    takes a gradient, until the backward pass. Gradients reach the stored entries alone.
    """

    _hf_quantized_needs_local_tp = True

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzeros: int,
        index: str,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Args: `index` is the code, one of `INDEX_CODES`."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.nonzeros, self.code = nonzeros, index
        self.weight = nn.Parameter(torch.empty(nonzeros, device=device, dtype=dtype))
        shapes = index_tensors(index, out_features, in_features, nonzeros)
        for name, (index_dtype, shape) in shapes.items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=index_dtype))
        bias_O = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(bias_O) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.dense_weight(), self.bias)

    def dense_weight(self) -> Tensor:
        """The weight [O, I] with zeros where nothing is stored, in the values' dtype."""
        tensors = dict(self.named_buffers(recurse=False))
        return materialize(self.code, tensors, self.weight, self.out_features, self.in_features)

    @property
    def indexed(self) -> str:
        """What a sound index names, in words."""
        return f"{self.nonzeros} entries in order"

    def is_sound(self) -> bool:
        """Whether the index names as many different entries as there are values, in order."""
        tensors = dict(self.named_buffers(recurse=False))
        return is_sound(self.code, tensors, self.out_features, self.in_features, self.nonzeros)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nonzeros={self.nonzeros}, index={self.code}, bias={self.bias is not None}"
        )


class LowRankSparseLinear(LowRankLinear):
    """A linear whose weight is a product plus N entries: `weight down.weight + sparse`.

    R (O + I) + N stored values; as many multiplications a token as the two parts take, of which the
    sparse one costs those of the dense linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        nonzeros: int,
        index: str,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, device=device, dtype=dtype)
        self.sparse = SparseLinear(
            in_features, out_features, nonzeros, index, bias=False, device=device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        sparse: Tensor = self.sparse(input)
        return super().forward(input) + sparse

    def dense_weight(self) -> Tensor:
        """Product and entries together, [O, I]."""
        return super().dense_weight() + self.sparse.dense_weight()
