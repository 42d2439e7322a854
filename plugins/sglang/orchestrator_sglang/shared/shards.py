# Copy of plugins/vllm/orchestrator_vllm/shards.py, by scripts/vendor_forms.py; change that file.
"""Linears of a checkpoint inside of a layer: their tensors as they come, and what is kept of them.

A layer has two products. The first one, a single matrix [F, I], gives the outputs of dense linears
and the inner values of factored ones; the second one, a matrix for each factored linear, the other
outputs. A tensor is copied to its place on the device when it comes; only tensors that need each
other wait.

Shape suffixes: O outputs, I inputs, R inner values, F rows of the first product.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from orchestrator_sglang.shared.forms import FORMS, index_codes
from orchestrator_sglang.shared.forms.base import StoredForm
from orchestrator_sglang.shared.forms.config import misfits
from orchestrator_sglang.shared.forms.errors import InputError
from orchestrator_sglang.shared.layout import ALIGNMENT, Division, Part, pivoted_places

DENSE = StoredForm(form="dense")
MANY = 2**40
"""More outputs than any linear has."""


class Shard:
    """One linear of the checkpoint, of which a rank has a part.

    Attributes:
        width: Rows that it has in the first product.
        first: These rows [width, I]; the layer gives them.
        second: Weight of the second product; None: there is none, or it has not come yet.
    """

    is_factored = False

    def __init__(self, name: str, form: StoredForm, part: Part, division: Division) -> None:
        self.name, self.form, self.part, self.division = name, form, part, division
        self.needed = self._needed()
        self.came: set[str] = set()
        self.width = part.outputs
        self.first: Tensor
        self.second: Tensor | None = None

    def _needed(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the checkpoint has of this linear, by name."""
        outputs, inputs = self.part.out_features, self.part.in_features
        if self.form.form == "dense":
            return {"weight": (outputs, inputs)}
        tensors = FORMS[self.form.form].tensors(self.form, outputs, inputs)
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        # stored with the linear whose basis it is
        return shapes | {"down.weight": (self.form.rank, inputs)} if self.form.basis else shapes

    def receive(self, name: str, tensor: Tensor) -> None:
        """Take a tensor of the checkpoint.

        Raises:
            InputError: The linear has no such tensor, or one of another shape, or it came before.
        """
        where = f"{self.name}.{name}"
        if name not in self.needed:
            known = ", ".join(self.needed)
            raise InputError(
                f"{where}: a {self.form.form} linear has {known}; the config is another model's"
            )
        if tuple(tensor.shape) != self.needed[name]:
            raise InputError(
                f"{where}: found shape {list(tensor.shape)}, the config needs "
                f"{list(self.needed[name])}; the checkpoint is damaged"
            )
        if name in self.came:
            raise InputError(f"{where}: is stored twice; the checkpoint is damaged")
        self.came.add(name)
        self._keep(name, tensor)

    def _keep(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to its place."""
        self.first.copy_(self.part.take_columns(self.part.take_rows(tensor)))

    def check_complete(self) -> None:
        """Raise InputError if a tensor has not come."""
        if not (missing := [name for name in self.needed if name not in self.came]):
            return
        if missing == ["down.weight"] and self.form.basis:
            raise InputError(
                f"{self.name}: its basis {self.form.basis} was not loaded here; if it is on "
                "another pipeline stage, serve without pipeline parallelism, or the dense export"
            )
        lacks = ", ".join(missing)
        raise InputError(f"{self.name}: {lacks} is not stored; the checkpoint is damaged")

    def places(self, inner_at: int, second_at: int) -> Tensor:
        """Places of the rank's outputs, int64, in the values of the products.

        Args:
            inner_at: First of this linear's values of the first product, after an exchange.
            second_at: First of its values of the second product.
        """
        start = second_at if self.is_factored else inner_at
        return torch.arange(start, start + self.part.outputs, device=self.first.device)


class MaterializedShard(Shard):
    """A linear with stored entries, which is multiplied out when its tensors are there."""

    def __init__(self, name: str, form: StoredForm, part: Part, division: Division) -> None:
        super().__init__(name, form, part, division)
        self.waiting: dict[str, Tensor] = {}

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor.to(self.first.device)
        if self.came == self.needed.keys():
            super()._keep("weight", self._dense())
            self.waiting = {}

    def _dense(self) -> Tensor:
        """The weight [O, I]; the sum of a product and entries is in float32 or wider.

        Raises:
            InputError: The index does not name as many entries as there are values.
        """
        prefix = "sparse." if "sparse.weight" in self.waiting else ""
        names = {name: f"{prefix}{name}" for name in ("index", "rows")}
        index = {name: self.waiting[n] for name, n in names.items() if n in self.waiting}
        sizes = {"out_features": self.part.out_features, "in_features": self.part.in_features}
        code = self.form.index
        if not index_codes.is_sound(code, index, **sizes, nonzeros=self.form.nonzeros):
            raise InputError(
                f"{self.name}: its index does not name {self.form.nonzeros} entries in order; the "
                "checkpoint is damaged"
            )
        entries = index_codes.materialize(code, index, self.waiting[f"{prefix}weight"], **sizes)
        if not prefix:
            return entries
        wide = torch.promote_types(entries.dtype, torch.float32)
        left, right = self.waiting["weight"].to(wide), self.waiting["down.weight"].to(wide)
        return torch.addmm(entries.to(wide), left, right)


class LowRankShard(Shard):
    """A linear of two factors."""

    is_factored = True

    def __init__(self, name: str, form: StoredForm, part: Part, division: Division) -> None:
        super().__init__(name, form, part, division)
        self.computed, self.used = division.computed(form.rank), division.used(form.rank)
        self.width = len(self.computed)

    def _keep(self, name: str, tensor: Tensor) -> None:
        if name == "down.weight":
            rows = self.part.take_columns(tensor[self.computed.start : self.computed.stop])
            self.first[: len(rows)].copy_(rows)
        else:
            self._keep_second(self.part.take_rows(tensor))

    def _keep_second(self, weight: Tensor, padding: int = 0) -> None:
        """Store the used columns of a weight, with zeros in what is padded."""
        columns = weight[:, self.used.start : self.used.stop]
        self.second = self.first.new_zeros(len(weight) + padding, len(self.used))
        self.second[: len(weight), : columns.shape[1]].copy_(columns)


class PivotedShard(LowRankShard):
    """A linear of pivots, which are outputs, and of combinations of them, the other outputs."""

    def __init__(self, name: str, form: StoredForm, part: Part, division: Division) -> None:
        super().__init__(name, form, part, division)
        self.waiting: dict[str, Tensor] = {}
        self.own_places: Tensor

    def _keep(self, name: str, tensor: Tensor) -> None:
        if name == "down.weight":
            super()._keep(name, tensor)
            return
        self.waiting[name] = tensor.to(self.first.device)
        if self.waiting.keys() == {"weight", "index"}:
            self._keep_combinations(self.waiting["weight"], self.waiting["index"].long())
            self.waiting = {}

    def _keep_combinations(self, weight: Tensor, index_O: Tensor) -> None:
        """Store the rows that this rank multiplies with, and the places of its outputs."""
        whole = torch.arange(len(index_O), device=index_O.device)
        if not torch.equal(index_O.sort().values, whole):
            raise InputError(
                f"{self.name}: its index does not name each of {len(index_O)} outputs once; the "
                "checkpoint is damaged"
            )
        summands = self.division.axis == "inputs"
        rows, self.own_places = pivoted_places(
            self.part.take_rows(index_O), self.form.rank, self.used, every_row=summands
        )
        # a zero row, whose value the pivots of other ranks are read from
        zeros = -(len(rows) + 1) % ALIGNMENT + 1 if summands and self.division.parts > 1 else 0
        self._keep_second(weight.index_select(0, rows), padding=zeros)

    def places(self, inner_at: int, second_at: int) -> Tensor:
        """Places of the rank's outputs; see `Shard`."""
        pivots = self.own_places < len(self.used)
        return self.own_places + torch.where(pivots, inner_at, second_at - len(self.used))


SHARDS: Mapping[str, type[Shard]] = {
    "dense": Shard,
    "low_rank": LowRankShard,
    "pivoted": PivotedShard,
    "sparse": MaterializedShard,
    "low_rank_sparse": MaterializedShard,
}


def make_shard(
    name: str,
    form: StoredForm | None,
    part: Part,
    division: Division,
    *,
    shares_basis: bool = False,
) -> Shard:
    """Return the shard of a linear.

    Args:
        form: None: it is dense.
        shares_basis: True if its basis is another linear's, or another linear uses it.

    Raises:
        InputError: A linear of this size cannot be stored in this form.
    """
    form = form or DENSE
    if form.form != "dense":
        # linears on one basis are weighed together; how many outputs they have is not known here
        outputs = MANY if shares_basis else part.out_features
        alone = {name: replace(form, basis="")}
        for _, reason in misfits(alone, {name: (outputs, part.in_features)}):
            raise InputError(f"{name}: {reason}; the config does not belong to this model")
    return SHARDS[form.form](name, form, part, division)
