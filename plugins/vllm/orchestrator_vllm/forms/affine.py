# Copy of orchestrator/models/forms/affine.py, by scripts/vendor_forms.py; change that file.
"""Two factors in the place of a dense weight, with a bias of their own.

Shape suffixes: O outputs, I inputs, R rank.
"""

from typing import Any, ClassVar, Self

from orchestrator_vllm.forms.base import Factored, FormTensor, StoredForm
from orchestrator_vllm.forms.low_rank import LowRankLinear


class AffineLinear(LowRankLinear):
    """A linear of two factors with a bias, also if the dense linear has none.

    `y = (x down^T) weight^T + bias`, `bias` [O] in the dtype of the factors. The mean output of the
    dense linear, its own bias included, is part of it, so that it takes the place of that bias.
    Under tensor parallelism it is split as the outputs are, or added once to the summed inner
    values' product.
    """

    form = "affine"
    optional: ClassVar[tuple[str, ...]] = ()
    keeps_bias: ClassVar[bool] = False

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
        return cls(in_features, out_features, stored.rank, **{**options, "bias": True})

    @classmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """The factors and the bias."""
        factors = super().tensors(stored, out_features, in_features)
        return (*factors, FormTensor(name="bias", part="bias", shape=(out_features,)))

    @classmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Ranks below break-even fit, floor(O (I - 1) / (O + I))."""
        break_even = out_features * (in_features - 1) // (in_features + out_features)
        if stored.rank < break_even:
            return ""
        linear = f"a [{out_features}, {in_features}] linear with a bias"
        return f"found rank {stored.rank}, {linear} takes 1 to {break_even - 1}"

    def factored(self) -> Factored | None:
        """Return None: compensation would change the factors and leave the bias as it is."""
        return None
