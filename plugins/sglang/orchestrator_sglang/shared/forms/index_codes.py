# Copy of orchestrator/models/forms/index_codes.py, by scripts/vendor_forms.py; change that file.
"""Codes for the positions of a sparse weight's values; of three, the smallest is used.

Positions are flat, row by row in the [O, I] weight, and ascending; the values stand in that order.
`bitmask` has one bit an element, the lowest bit of a byte first; `columns` the column number of
every value and, for each row, how many values stand before it; `positions` the positions
themselves. The smallest one follows from the sizes alone (`orchestrator.plan.forms.index_sizes`).

Shape suffixes: O outputs, I inputs, E elements (O I), N nonzeros.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INDEX_CODES = ("bitmask", "columns", "positions")


def possible_codes(out_features: int, in_features: int) -> list[str]:
    """The codes whose whole numbers are wide enough for a weight of this size."""
    limits = {"columns": in_features <= 2**16, "positions": out_features * in_features <= 2**31}
    return [code for code in INDEX_CODES if limits.get(code, True)]


def index_tensors(
    code: str, out_features: int, in_features: int, nonzeros: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors of a code, by name; no data is needed.

    Column numbers go up to 65535 and are the bits of an int16: the unsigned type of that width is
    one that few programs read.
    """
    if code == "bitmask":
        return {"index": (torch.uint8, ((out_features * in_features + 7) // 8,))}
    if code == "columns":
        return {"index": (torch.int16, (nonzeros,)), "rows": (torch.int32, (out_features + 1,))}
    return {"index": (torch.int32, (nonzeros,))}


def encode(
    code: str, positions_N: Tensor, out_features: int, in_features: int
) -> dict[str, Tensor]:
    """The tensors of a code for ascending flat positions, on their device."""
    positions_N = positions_N.long()
    if code == "bitmask":
        elements = out_features * in_features
        bits = torch.zeros((elements + 7) // 8 * 8, dtype=torch.uint8, device=positions_N.device)
        bits[positions_N] = 1
        return {"index": (bits.view(-1, 8) << _bit_numbers(bits)).sum(dim=1, dtype=torch.uint8)}
    if code == "columns":
        row_N = positions_N // in_features
        counts_O = torch.bincount(row_N, minlength=out_features)
        rows = torch.nn.functional.pad(counts_O.cumsum(dim=0), (1, 0))
        # the cast wraps: 32768 and above become negative
        return {"index": (positions_N % in_features).to(torch.int16), "rows": rows.int()}
    return {"index": positions_N.int()}


def decode(code: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
    """The positions [N], int64: what `encode` was given."""
    index = tensors["index"]
    if code == "bitmask":
        return _mask(index, out_features * in_features).nonzero().squeeze(1)
    if code == "columns":
        counts_O = tensors["rows"].diff()
        # with its size given, the result has a shape that needs no data
        rows_O = torch.arange(out_features, device=index.device)
        row_N = rows_O.repeat_interleave(counts_O, output_size=len(index))
        return row_N * in_features + (index.int() & 0xFFFF)
    return index.long()


def materialize(
    code: str,
    tensors: Mapping[str, Tensor],
    values_N: Tensor,
    *,
    out_features: int,
    in_features: int,
) -> Tensor:
    """The dense weight [O, I], in the values' dtype; differentiable in the values.

    Memory beyond the result: one byte an element and its running sum for `bitmask`, 8 to 24 bytes
    a nonzero for the others. No shape depends on data, so it runs on the meta device and compiles.
    """
    elements = out_features * in_features
    if code == "bitmask":
        trains = values_N.requires_grad and not torch.compiler.is_compiling()
        spread = _Spread.apply if trains else _spread
        dense_E: Tensor = spread(values_N, _mask(tensors["index"], elements))
    else:
        positions_N = decode(code, tensors, out_features, in_features)
        dense_E = values_N.new_zeros(elements).scatter(0, positions_N, values_N)
    return dense_E.view(out_features, in_features)


def _spread(values_N: Tensor, mask_E: Tensor) -> Tensor:
    """Zeros [E] with the values where the mask is true."""
    return values_N.new_zeros(mask_E.shape).masked_scatter(mask_E, values_N)


class _Spread(torch.autograd.Function):
    """`_spread` with a backward pass that knows the number of values.

    The backward pass of `masked_scatter` reads it from the device, once a linear and pass.
    """

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, mask_E: Tensor) -> Tensor:
        ctx.save_for_backward(mask_E)
        ctx.nonzeros = len(values_N)
        return _spread(values_N, mask_E)

    @staticmethod
    def backward(ctx: Any, grad_E: Tensor) -> tuple[Tensor, None]:
        (mask_E,) = ctx.saved_tensors
        positions_N = torch.nonzero_static(mask_E, size=ctx.nonzeros).squeeze(1)
        return grad_E.index_select(0, positions_N), None


def is_sound(
    code: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int, *, nonzeros: int
) -> bool:
    """True if the tensors hold ascending positions of the weight, as many as there are values.

    An index that is not stored holds whatever was in memory, and scatters values anywhere.
    """
    rows = tensors.get("rows")
    if rows is not None:
        counts_O = rows.long().diff()  # in 32 bits differences wrap
        if rows[0] != 0 or rows[-1] != nonzeros or bool((counts_O < 0).any()):
            return False
    positions_N = decode(code, tensors, out_features, in_features)
    return (
        len(positions_N) == nonzeros
        and int(positions_N[0]) >= 0
        and int(positions_N[-1]) < out_features * in_features
        and bool((positions_N.diff() > 0).all())
    )


def _bit_numbers(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _mask(index: Tensor, elements: int) -> Tensor:
    """Bits to booleans [E]; what the last byte has beyond them is dropped."""
    return (index[:, None] >> _bit_numbers(index) & 1).bool().view(-1)[:elements]
