# Copy of orchestrator/models/forms/base.py, by scripts/vendor_forms.py; change that file.
"""Base class of the modules that stand in the place of a dense linear, one for each form.

Every one keeps under the name `weight` a tensor that cannot have the dense weight's shape, on
purpose: a program that does not know the form finds the wrong shape and stops, where a missing
tensor would have been filled with random values; for experts that are gone or tied, the guard of
their block does that. None is an `nn.Linear`: programs that look for those take `weight` for the
dense matrix. Values are parameters in one dtype, indices are buffers of whole numbers that no cast
of the model changes.

The file of a form imports torch, `orchestrator_sglang.shared.forms.errors` and this package only: its text becomes part
of the file that loads a checkpoint without orchestrator (`orchestrator.hf.bootstrap`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

Split = Literal["whole", "weight", "parts"]
"""Rule by which tensor parallelism splits a module: `whole`, all tensors on every rank; `weight`,
the rows of `weight` over the ranks and all else whole; `parts`, each submodule by its own rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """Form and size of one module, as the config has them."""

    form: str
    rank: int = 0
    nonzeros: int = 0
    index: str = ""
    """The code of the nonzeros' positions."""
    basis: str = ""
    """Name of the module whose basis this one is tied to; empty: it has its own."""

    def to_json(self) -> dict[str, Any]:
        """The entry of the config: the fields that the form has."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormTensor:
    """One stored tensor of a module."""

    name: str
    """Name in the module, `down.weight`."""
    part: str
    """Role in the linear, `weight` or `others`; the key by which a worker finds its values."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None: a tensor of values, in the dtype of the weight. An index has a dtype of its own."""
    code: str = ""
    """Code of the index that the tensor is a part of, or that its values stand by."""


Gated = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""Outputs [..., O] of inputs [..., I], given the product of activations and scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterScales:
    """Scales s of a parameter W0, trained in place of its values: W = W0 * spread(s)."""

    count: int
    """Number of scales."""
    spread: Callable[[Tensor], Tensor]
    """Expands the scales [count] to a shape that broadcasts to the parameter's."""
    gather: Callable[[Tensor], Tensor]
    """Sums values of the parameter's shape over those that each scale multiplies, to [count]."""
    gated: Gated | None = None
    """The module with its activations [..., count] scaled where that gives the same outputs, so
    that no gradient of the parameter is made; None: the parameter is scaled."""


Pivot = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Pivoting of factors [O, R] and [R, I]: combinations [O - R, R], pivots [R, I], order [O]."""


class Factored(Protocol):
    """A linear with the weight `left right + rest`, whose two factors no other linear shares."""

    def left_factor(self) -> Tensor:
        """The left factor [O, R] without gradients, with a row for each output."""
        ...

    def right_factor(self) -> Tensor:
        """The right factor [R, I] without gradients."""
        ...

    def rest(self) -> Tensor | None:
        """The part of the weight beside the product, [O, I] without gradients; None: there is none.

        It has the factors' dtype and device.
        """
        ...

    def set_factors(
        self, left_OR: Tensor | None, right_RI: Tensor, *, pivot: Pivot
    ) -> dict[str, Tensor]:
        """Store factors of the same rank in place.

        Args:
            left_OR: None: the left factor is the one that the module has.
            pivot: For a form that stores pivoted factors.

        Returns:
            The tensors that are changed, by name in the module.
        """
        ...


class FormLinear(nn.Module, ABC):
    """A linear in one form: inputs [..., I] to outputs [..., O].

    A form is one file with a subclass, and one line in `FORMS`; its sizes are one file in
    `orchestrator.plan.forms`.
    """

    form: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """Fields in the config, of `rank`, `nonzeros` and `index`."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields that may be left out."""
    split_outputs: ClassVar[Split] = "whole"
    """Rule if the model's plan splits the outputs of the linear."""
    split_inputs: ClassVar[Split] = "whole"
    """Rule if the model's plan splits the inputs of the linear."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the submodules that have a rule of their own if `split_inputs` is `parts`."""
    basis_tensor: ClassVar[str] = "down.weight"
    """Tensor that linears share which have `basis` among their fields: of the inputs, or `weight`
    of the outputs."""
    keeps_bias: ClassVar[bool] = True
    """False if the bias of the linear goes with its weight."""
    stored_with_values: ClassVar[tuple[str, ...]] = ()
    """Buffers that a unit of trained values stores too: those computed after the plan, whose own
    unit is removed once the values are trained."""

    # transformers then hands local tensors, not DTensors, to `forward` under tensor parallelism
    _hf_quantized_needs_local_tp = True

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    @abstractmethod
    def make(
        cls,
        stored: StoredForm,
        in_features: int,
        out_features: int,
        *,
        shares_basis: bool,
        **options: Any,
    ) -> Self:
        """A module of this size with empty parameters.

        Args:
            shares_basis: True if the basis is another linear's, or another linear uses it.
            options: `bias`, `device` and `dtype`.
        """

    @classmethod
    @abstractmethod
    def tensors(
        cls, stored: StoredForm, out_features: int, in_features: int
    ) -> tuple[FormTensor, ...]:
        """The tensors that are stored of a linear, without the bias."""

    @classmethod
    @abstractmethod
    def misfit(cls, stored: StoredForm, out_features: int, in_features: int) -> str:
        """Reason why a linear of this size cannot be stored like this; empty if it can.

        The fields that the form needs are given, and no others. Outputs are those of all linears
        on one basis together.
        """

    @classmethod
    def stored_values(cls, stored: StoredForm, out_features: int, in_features: int) -> int:
        """Number of stored values; an index has none."""
        tensors = cls.tensors(stored, out_features, in_features)
        return sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype is None)

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight [O, I] that the module multiplies with, in the dtype of its values."""

    @property
    def indexed(self) -> str:
        """Description of what a sound index names, for messages."""
        return ""

    def is_sound(self) -> bool:
        """True if the index of this module, its submodules left out, names what it must."""
        return True

    def factored(self) -> Factored | None:
        """This module if compensation can refit its two factors; None otherwise."""
        return None

    @property
    def adaptable(self) -> tuple[str, ...]:
        """Factors that low-rank adapters can train, of `weight` and `down`.

        `weight` is the parameter, if it is a matrix; `down` a linear of its own.
        """
        return ("weight",) if self.weight.dim() == 2 else ()

    def scales(self) -> Mapping[str, ParameterScales]:
        """Scales that a light training trains, by the name of their parameter in this module.

        Of parameters that are not named, vectors are trained directly, and matrices are not.
        """
        return {}
