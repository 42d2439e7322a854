"""Two factors of a weight, and some entries of what they leave."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from orchestrator.models.forms.base import FormTensor, StoredForm
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.sparse import SparseLinear, entry_misfit, entry_tensors


class LowRankSparseLinear(LowRankLinear):
    """A linear whose weight is a product plus N entries: `weight down.weight + sparse`.

    R (O + I) + N stored values; as many multiplications a token as the two parts take, of which the
    sparse one costs those of the dense linear.
    """

    form = "low_rank_sparse"
    fields = ("rank", "nonzeros", "index")
    optional = ()
    # the entries have an order of their own
    split_outputs = "whole"
    parts = ("down", "sparse")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        nonzeros: int,
        *,
        index: str,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias=bias, device=device, dtype=dtype)
        self.sparse = SparseLinear(
            in_features, out_features, nonzeros, index, bias=False, device=device, dtype=dtype
        )

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
        sizes = in_features, out_features, stored.rank, stored.nonzeros
        return cls(*sizes, index=stored.index, **options)

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """The factors, the entries, and the index of their positions."""
        factors = super().tensors(stored, out_features, in_features)
        return factors + entry_tensors(stored, out_features, in_features, "sparse.")

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Factors and entries fit that store fewer values than the dense weight together."""
        stored_values = cls.stored_values(stored, out_features, in_features)
        return entry_misfit(stored, out_features, in_features, stored_values=stored_values)

    def forward(self, input: Tensor) -> Tensor:
        sparse: Tensor = self.sparse(input)
        return super().forward(input) + sparse

    def _gated(self, gate: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        sparse: Tensor = self.sparse(input)
        return super()._gated(gate, input) + sparse

    def dense_weight(self) -> Tensor:
        """Product and entries together, [O, I]."""
        return super().dense_weight() + self.sparse.dense_weight()

    def rest(self) -> Tensor:
        """The entries [O, I] with zeros at the other positions."""
        return self.sparse.dense_weight().detach()
