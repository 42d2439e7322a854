"""Gates: one factor for each direction of a product of two matrices, with gradients of its own.

With z = D x the product U diag(s) D has, for the loss L and g = dL/dy,

    dL/ds_i = h_i = sum_t (u_i^T g_t) z_ti = u_i^T G D_i^T,    G = dL/dW = sum_t g_t x_t^T,

so that gates need neither G nor a gradient of a factor: z is kept from the forward pass, U^T g is
formed on the way to x anyway. If U D is the whole of W, sum_i h_i = <G, W>_F.

Shape suffixes: O outputs, I inputs, R directions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class GatedLowRankLinear(nn.Module):
    """Linear with a gate for each direction, and one for what the directions leave of its weight.

        y = U (s * z) + s_tail (W x - U z) + bias,    z = D x

    is computed as U ((s - s_tail) * z) + s_tail W x + bias, which gives W x to the bit if all gates
    are 1. Without a dense weight there is no tail: y = U (s * z) + bias.

    It stands in for a linear (`Shard.run_as`), and has no name in the model. Gates are float32
    parameters; U, D, W are not trained, in any dtype, and share memory with the given tensors.
    Products are computed in the dtype of x. A caller that trains other numbers than the gates
    writes the gates of a pass, and continues their gradient by the chain rule.

    Cost of a pass: R (O + I) multiply-adds a token, and O I with a tail, forward and once again for
    the gradient of x; R more for those of the gates. Kept for the backward pass: z [..., R], and x
    [..., I] with a tail, which linears at one site share. No tensor of a factor's or a weight's
    size is allocated unless its dtype is not that of x; then one at a time, during its product.

    Source: the gates of ACIP (arXiv 2502.01717) in units where a gate is 1 at the start; the tail
    is ours: without it a linear starts at break-even, where half of a square weight is missing.

    Args:
        left_OR: U. Its columns may have any norm.
        right_RI: D.
        weight_OI: W; None: no tail.
        bias_O: Added as it is; may be trained.
        adapter: Term of the outputs that is trained beside the gates.
    """

    left_OR: Tensor
    right_RI: Tensor
    weight_OI: Tensor | None

    def __init__(
        self,
        left_OR: Tensor,
        right_RI: Tensor,
        weight_OI: Tensor | None = None,
        bias_O: Tensor | None = None,
        *,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("left_OR", left_OR.detach())
        self.register_buffer("right_RI", right_RI.detach())
        self.register_buffer("weight_OI", None if weight_OI is None else weight_OI.detach())
        self.bias_O = bias_O
        self.adapter = adapter
        options: dict[str, Any] = {"dtype": torch.float32, "device": left_OR.device}
        self.gates_R = nn.Parameter(torch.ones(len(right_RI), **options))
        self.tail = None if weight_OI is None else nn.Parameter(torch.ones(1, **options))

    def forward(self, input: Tensor) -> Tensor:
        """Outputs [..., O] of inputs [..., I], in the inputs' dtype."""
        inner = product(input, self.right_RI)
        if self.weight_OI is None or self.tail is None:
            output = product(scaled(inner, self.gates_R), self.left_OR)
        else:
            directions = product(scaled(inner, self.gates_R - self.tail), self.left_OR)
            output = directions + product(input, self.weight_OI, self.tail)
        if self.adapter is not None:
            output = output + self.adapter(input)
        return output if self.bias_O is None else output + self.bias_O


def scaled(values: Tensor, gates: Tensor) -> Tensor:
    """Multiply values [..., R] by gates [R].

    The product is rounded once to the dtype of the values. The gates' gradient is summed over all
    other dimensions in float32 (float64 for values in it), whatever the dtype of the values.
    """
    found: Tensor = _ByGates.apply(values, gates)  # type: ignore[no-untyped-call]
    return found


def product(values: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """Multiply values [..., N] by gate * weight^T, of a weight [M, N] without a gradient.

    Computed in the dtype of the values. The gradient of the gate [1] is

        sum_t <weight^T g_t, values_t> = <G, weight>_F,

    of numbers that the gradient of the values needs anyway, summed as in `scaled`.
    """
    found: Tensor = _ByWeight.apply(values, weight, gate)  # type: ignore[no-untyped-call]
    return found


class _ByGates(torch.autograd.Function):
    """Product of values and gates; keeps the values."""

    @staticmethod
    def forward(values: Tensor, gates: Tensor) -> Tensor:
        return (values * gates).to(values.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        values, gates = ctx.saved_tensors
        to_values, to_gates = ctx.needs_input_grad
        return (
            (grad * gates).to(values.dtype) if to_values else None,
            _summed(grad, values, gates) if to_gates else None,
        )


class _ByWeight(torch.autograd.Function):
    """Product with a weight that is not trained; keeps the values only for the gate."""

    @staticmethod
    def forward(values: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
        found = linear(values, weight.to(values.dtype))
        return found if gate is None else (found * gate).to(values.dtype)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        values, weight, gate = inputs
        ctx.save_for_backward(weight, gate, None if gate is None else values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        weight, gate, values = ctx.saved_tensors
        back = grad @ weight.to(grad.dtype)
        if gate is None:
            return back, None, None
        to_gate = _summed(back, values, gate) if ctx.needs_input_grad[2] else None
        return (back * gate).to(back.dtype), None, to_gate


def _summed(one: Tensor, other: Tensor, gates: Tensor) -> Tensor:
    """Sum one * other to the shape of the gates, in float32 at least."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) * other.to(wide)).sum_to_size(gates.shape).to(gates.dtype)
