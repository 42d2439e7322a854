"""Compressed linears in a linear layer of a server: loading, and two products in place of one.

The layer has the names of the checkpoint as empty parameters, whose loaders take the tensors: a
server looks up parameters by name, and hands over the tensor with its projection. Its own loaders
are of no use, since they take all projections of a layer for equally wide.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from orchestrator_vllm.forms.base import StoredForm
from orchestrator_vllm.forms.errors import InputError
from orchestrator_vllm.layout import Division, Part
from orchestrator_vllm.products import Collective, Products
from orchestrator_vllm.shards import Shard, make_shard

PROJECTIONS = {"q": 0, "k": 1, "v": 2}


class Forms(Protocol):
    """The forms of a model, as its config has them."""

    members: dict[str, list[Shard]]
    """Linears that share a basis with the linear of a name, in the layers that exist."""

    @property
    def bases(self) -> set[str]:
        """Names of the linears whose basis others use."""
        ...

    def check_claimed(self) -> None:
        """Raise InputError if the config names a linear that no layer of the model has."""
        ...


class StoredName(Parameter):
    """Empty parameter under a name of the checkpoint, whose `weight_loader` takes the tensor."""

    stored_name: str
    server: str
    weight_loader: Callable[..., None]

    def __new__(cls, empty: Tensor, name: str, server: str) -> "StoredName":
        made = super().__new__(cls, empty, requires_grad=False)
        made.stored_name, made.server = name, server
        return made

    @property
    def output_dim(self) -> int:
        """Dimension of the outputs, which loaders of some models ask for to put rows in order.

        Raises:
            InputError: Always: rows of factors are no outputs, and would be left as they are.
        """
        raise InputError(
            f"{self.stored_name}: {self.server}'s loader of this model puts rows in another order, "
            "which is not known for compressed linears; serve the dense export"
        )


class FactoredLinear:
    """Method of one layer of which some linears are compressed, as far as servers agree on it.

    Each product is a dense linear of the server's own, in a child module of the layer: `first`, and
    `second_0`, ... by the number of the linear.
    """

    server: ClassVar[str]
    """Name of the server, for messages."""

    def __init__(
        self, config: Forms, forms: Mapping[str, StoredForm | None], *, dense: Any
    ) -> None:
        """Method of a layer.

        Args:
            forms: Forms by name of the linears of the checkpoint; None: a dense one.
            dense: The server's method of dense linears.
        """
        self.config, self.forms, self.dense = config, forms, dense
        self.products: Products | None = None
        self.seconds: tuple[str, ...] = ()

    def make_room(
        self,
        layer: nn.Module,
        prefix: str,
        *,
        division: Division,
        parts: list[Part],
        dtype: torch.dtype,
    ) -> None:
        """Make room for the weights, and register the names of the checkpoint."""
        bases = self.config.bases
        shards = [
            make_shard(
                name, form, part, division, shares_basis=name in bases or bool(form and form.basis)
            )
            for (name, form), part in zip(self.forms.items(), parts, strict=True)
        ]
        like = torch.empty(0, dtype=dtype)
        self.products = Products(shards, division, like)
        for shard in shards:
            if shard.form.basis:
                self.config.members.setdefault(shard.form.basis, []).append(shard)
        for name in dict.fromkeys(name for shard in shards for name in shard.needed):
            self._register(layer, prefix, name, like)

    def _register(self, layer: nn.Module, prefix: str, name: str, like: Tensor) -> None:
        """Register an empty parameter under a name of the checkpoint, `down.weight`."""
        *path, leaf = name.split(".")
        module = layer
        for step in path:
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        is_index = leaf in ("index", "rows")
        empty = like.new_empty(0, dtype=torch.int32) if is_index else like.new_empty(0)
        parameter = StoredName(empty, f"{prefix}.{name}", self.server)

        def weight_loader(
            parameter: StoredName, loaded: Tensor, shard_id: str | int | None = None
        ) -> None:
            self._load(name, loaded, shard_id)

        parameter.weight_loader = weight_loader
        module.register_parameter(leaf, parameter)

    def _load(self, name: str, loaded: Tensor, shard_id: str | int | None) -> None:
        """Take a tensor of the checkpoint, and hand a shared basis to the linears that share it.

        Raises:
            InputError: It is not a tensor of a linear in this layer, or weights were loaded before.
        """
        if self.products is None:
            raise InputError(
                f"{next(iter(self.forms))}: compressed weights are loaded once; start the server "
                "again to load others"
            )
        shards = self.products.shards
        number = PROJECTIONS.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
        if number is None and len(shards) == 1:
            number = 0
        if not isinstance(number, int) or number >= len(shards):
            raise InputError(
                f"{', '.join(self.forms)}: found a tensor {name!r} of the projection {shard_id!r}, "
                f"which {self.server}'s loader of this model divides by itself; serve the dense "
                "export"
            )
        shard = shards[number]
        shard.receive(name, loaded)
        if name == "down.weight":
            for member in self.config.members.get(shard.name, ()):
                member.receive(name, loaded)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all tensors came, and give the products to the layer.

        Raises:
            InputError: A tensor did not come, or the model lacks a linear of the config.
        """
        if self.products is None:
            return
        self.config.check_claimed()
        self.products.check_complete()
        self.flow, order_O = self.products.flow(), self.products.order()
        layer.register_buffer("order", order_O, persistent=False)
        self._add_product(layer, "first", self.products.first_FI)
        seconds = []
        for number, weight in enumerate(self.products.seconds()):
            name = "" if weight is None else f"second_{number}"
            if weight is not None:
                self._add_product(layer, name, weight)
            seconds.append(name)
        self.seconds = tuple(seconds)
        # linears on a shared basis are still in the config's table
        self.products.release()
        self.products = None

    def _add_product(self, layer: nn.Module, name: str, weight: Tensor) -> None:
        """Add a dense linear in the platform's own layout."""
        module = nn.Module()
        module.weight = Parameter(weight, requires_grad=False)
        layer.add_module(name, module)
        self.dense.process_weights_after_loading(module)

    def multiply(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        *,
        gather: Collective,
        scatter: Collective,
    ) -> Tensor:
        """Map inputs [..., I] to outputs [..., O] of this rank; exchanges as in `Flow.inner`."""
        first = self.dense.apply(layer.first, x)
        parts = self.flow.inner(first, gather=gather, scatter=scatter)
        seconds = [
            self.dense.apply(getattr(layer, name), part.contiguous()) if name else None
            for name, part in zip(self.seconds, parts, strict=True)
        ]
        outputs = self.flow.outputs(parts, seconds, layer.order)
        return outputs if bias is None else outputs + bias
