# Copy of plugins/vllm/orchestrator_vllm/products.py, by scripts/vendor_forms.py; change that file.
"""The two products of a layer: their weights, and how outputs come out of their values.

Shape suffixes: F rows of the first product, I inputs, R inner values, O outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator_sglang.shared.layout import Division
from orchestrator_sglang.shared.shards import Shard

Collective = Callable[[Tensor], Tensor]
"""An exchange between ranks, over the last dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Path of the values of a layer from its first product to its outputs.

    All sizes are numbers, fixed when the model is loaded: no shape depends on data.
    """

    widths: tuple[int, ...]
    """Values of every linear in the first product."""
    factored: tuple[bool, ...]
    """True for every linear that has inner values in the first product."""
    division: Division

    def inner(self, first: Tensor, *, gather: Collective, scatter: Collective) -> list[Tensor]:
        """Split the first product's values [..., F] by linear, after the exchange of inner values.

        Args:
            gather: Concatenates the values of all ranks.
            scatter: Sums the values over the ranks, of which each keeps its part.
        """
        parts = list(first.split(self.widths, dim=-1)) if len(self.widths) > 1 else [first]
        if self.division.parts == 1 or not any(self.factored):
            return parts
        if self.division.axis == "inputs":
            return [scatter(part) for part in parts]
        sent = [part for part, is_inner in zip(parts, self.factored, strict=True) if is_inner]
        widths = [part.shape[-1] for part in sent]
        # one exchange for the layer: [rank, all linears] becomes [rank, values] of each linear
        together = gather(torch.cat(sent, dim=-1) if len(sent) > 1 else sent[0].contiguous())
        by_rank = together.unflatten(-1, (self.division.parts, -1)).split(widths, dim=-1)
        found = iter([part.flatten(-2) for part in by_rank])
        return [
            next(found) if is_inner else part
            for part, is_inner in zip(parts, self.factored, strict=True)
        ]

    def outputs(
        self, parts: Sequence[Tensor], seconds: Sequence[Tensor | None], order_O: Tensor | None
    ) -> Tensor:
        """Put the outputs together.

        Args:
            parts: Values of the first product by linear, as `inner` returns them.
            seconds: Values of the second product by linear; None where there is none.
            order_O: Place of every output in all values, int64; None: outputs are in order.
        """
        if order_O is not None:
            given = [*parts, *(each for each in seconds if each is not None)]
            return in_order(torch.cat(given, dim=-1), order_O)
        chosen = [
            part if second is None else second for part, second in zip(parts, seconds, strict=True)
        ]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def in_order(values: Tensor, order_O: Tensor) -> Tensor:
    """Return values [..., O] in an order.

    On a CPU, with 512 rows of 11264 values and one thread, `index_select` takes 7 ms of float32 and
    34 ms of bfloat16, `gather` 11 and 17 ms, or 12 ms of the latter as whole numbers.
    """
    if values.device.type == "cpu" and values.element_size() == 2:
        bits = values.view(torch.int16)
        return bits.gather(-1, order_O.expand(bits.shape)).view(values.dtype)
    return values.index_select(-1, order_O)


class Products:
    """Weights of a layer while they are loaded.

    Args:
        shards: The linears of the checkpoint in the layer, at least one of them compressed.
        like: A tensor of the dtype and on the device of the weights.
    """

    def __init__(self, shards: Sequence[Shard], division: Division, like: Tensor) -> None:
        self.shards, self.division = tuple(shards), division
        widths = [shard.width for shard in self.shards]
        self.first_FI = like.new_zeros(sum(widths), len(self.shards[0].part.columns))
        for shard, rows in zip(self.shards, self.first_FI.split(widths), strict=True):
            shard.first = rows

    def check_complete(self) -> None:
        """Raise InputError if a tensor of a linear has not come."""
        for shard in self.shards:
            shard.check_complete()

    def release(self) -> None:
        """Drop the weights, which the layer has now, perhaps in another layout."""
        empty = self.first_FI.new_empty(0)
        self.first_FI = empty
        for shard in self.shards:
            shard.first, shard.second = empty, None

    def flow(self) -> Flow:
        """Return the path of the values."""
        return Flow(
            widths=tuple(shard.width for shard in self.shards),
            factored=tuple(shard.is_factored for shard in self.shards),
            division=self.division,
        )

    def seconds(self) -> list[Tensor | None]:
        """Return the weight of every linear's second product; None if it has no rows."""
        weights = (shard.second for shard in self.shards)
        return [weight if weight is not None and len(weight) else None for weight in weights]

    def order(self) -> Tensor | None:
        """Return the place of every output in all values, int64; None if outputs are in order."""
        if not any(shard.form.form == "pivoted" for shard in self.shards):
            return None
        used = [
            len(self.division.used(shard.form.rank)) if shard.is_factored else shard.width
            for shard in self.shards
        ]
        inner_at, second_at, places = 0, sum(used), []
        for shard, width in zip(self.shards, used, strict=True):
            places.append(shard.places(inner_at, second_at))
            inner_at += width
            second_at += 0 if shard.second is None else len(shard.second)
        return torch.cat(places)
