"""Some entries of a weight, and an index of their positions.

Shape suffixes: O outputs, I inputs, N nonzeros.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orchestrator.models.forms.base import FormLinear, FormTensor, ParameterScales, StoredForm
from orchestrator.models.forms.index_codes import (
    decode,
    index_tensors,
    is_sound,
    materialize,
    possible_codes,
)


def entry_tensors(
    stored: StoredForm, out_features: int, in_features: int, prefix: str = ""
) -> tuple[FormTensor, ...]:
    """Return the entries [N] of a weight and the tensors of their index, by prefixed names."""
    code, nonzeros = stored.index, stored.nonzeros
    index = index_tensors(code, out_features, in_features, nonzeros)
    return (
        FormTensor(name=f"{prefix}weight", part="values", shape=(nonzeros,), code=code),
        *(
            FormTensor(name=prefix + name, part=name, shape=shape, dtype=dtype, code=code)
            for name, (dtype, shape) in index.items()
        ),
    )


def entry_misfit(
    stored: StoredForm, out_features: int, in_features: int, *, stored_values: int
) -> str:
    """Return why entries, with any factors, save no values or have no index; empty if valid."""
    linear = f"a [{out_features}, {in_features}] linear"
    codes = possible_codes(out_features, in_features)
    if stored.index not in codes:
        return f"found index {reprlib.repr(stored.index)}, {linear} takes {', '.join(codes)}"
    elements = out_features * in_features
    if stored_values < elements:
        return ""
    rank = f"rank {stored.rank} and " if stored.rank else ""
    return (
        f"found {rank}{stored.nonzeros} nonzeros, which store {stored_values} values, "
        f"{linear} has {elements} and takes fewer"
    )


class SparseLinear(FormLinear):
    """Linear with N stored entries, `weight` [N], and an index of their positions.

    Reduces storage and memory, not time: each forward pass writes the dense weight [O, I] and
    multiplies with it. The dense weight is freed after the product, or after the backward pass if
    the input has a gradient. Only the stored entries have gradients.
    """

    form = "sparse"
    fields = ("nonzeros", "index")

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
        """Allocate the tensors; `index` is the code of the positions, one of `INDEX_CODES`."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.nonzeros, self.code = nonzeros, index
        self.weight = nn.Parameter(torch.empty(nonzeros, device=device, dtype=dtype))
        shapes = index_tensors(index, out_features, in_features, nonzeros)
        for name, (index_dtype, shape) in shapes.items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=index_dtype))
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
        return cls(in_features, out_features, stored.nonzeros, stored.index, **options)

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """Return the entries and the index of their positions."""
        return entry_tensors(stored, out_features, in_features)

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Return a reason if there are as many entries as dense values, or no code for them."""
        stored_values = cls.stored_values(stored, out_features, in_features)
        return entry_misfit(stored, out_features, in_features, stored_values=stored_values)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.dense_weight(), self.bias)

    def dense_weight(self) -> Tensor:
        """Dense weight [O, I], in the dtype of the entries; positions without an entry are zero."""
        tensors = dict(self.named_buffers(recurse=False))
        return materialize(
            self.code,
            tensors,
            self.weight,
            out_features=self.out_features,
            in_features=self.in_features,
        )

    def scales(self) -> Mapping[str, ParameterScales]:
        """Return one scale for each output; entries are stored by outputs."""
        tensors = dict(self.named_buffers(recurse=False))
        positions_N = decode(self.code, tensors, self.out_features, self.in_features)
        counts_O = (positions_N // self.in_features).bincount(minlength=self.out_features)
        # `output_size` and `unsafe` avoid reads of the device; the lengths are valid
        return {
            "weight": ParameterScales(
                count=self.out_features,
                spread=lambda scale_O: scale_O.repeat_interleave(
                    counts_O, output_size=self.nonzeros
                ),
                gather=lambda values_N: torch.segment_reduce(
                    values_N, "sum", lengths=counts_O, unsafe=True
                ),
                gated=self._gated,
            )
        }

    def _gated(self, gate: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        product = gate(linear(input, self.dense_weight()))
        return product if self.bias is None else product + self.bias

    @property
    def indexed(self) -> str:
        """Description of what a sound index names, for messages."""
        return f"{self.nonzeros} entries in order"

    def is_sound(self) -> bool:
        """True if the index names as many different entries as there are values, in order."""
        tensors = dict(self.named_buffers(recurse=False))
        sizes = self.out_features, self.in_features
        return is_sound(self.code, tensors, *sizes, nonzeros=self.nonzeros)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nonzeros={self.nonzeros}, index={self.code}, bias={self.bias is not None}"
        )
