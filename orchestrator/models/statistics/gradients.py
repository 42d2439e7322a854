"""Gradients of the loss at the outputs of linears, and the statistics that pair them with inputs.

Shape suffixes: T tokens, O outputs, I inputs, K directions.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from orchestrator.linalg.gradients import DirectionGradients, WeightGradient
from orchestrator.models.experts.module import Experts, RoutedRows
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.statistics.routed import ChunkRows, rows_of
from orchestrator.plan.linear import Linear

Gather = Callable[[Tensor, RoutedRows | None], None]
"""Takes a gradient with respect to an output, and the rows of the expert that made it."""
PairedKind = Literal["weight", "directions"]
PairedGradient = WeightGradient | DirectionGradients
KINDS: dict[PairedKind, type[PairedGradient]] = {
    "weight": WeightGradient,
    "directions": DirectionGradients,
}
"""Statistics by the trait `gradient` of a method."""


def on_gradient(
    module: nn.Module, experts: Experts | None, gather: Callable[[Tensor], Gather]
) -> Any:
    """Call a function with every gradient with respect to the outputs of a linear.

    Args:
        gather: Function of the linear's inputs in a forward pass; its result takes the gradient.

    Returns:
        The hook, to be removed.
    """

    def monitor(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # the model's first linears have no predecessor that requires a gradient
        # the rows of an expert are known during its forward pass alone
        add, routed = gather(inputs[0]), rows_of(experts)
        output.requires_grad_().register_hook(  # type: ignore[no-untyped-call]
            lambda grad: add(grad, routed)
        )

    return module.register_forward_hook(monitor)


class PairedGradients:
    """Statistics of gradients together with the inputs of the same tokens, by linear.

    Inputs of an expert are not weighted: its gradients contain the router's weights. Between the
    forward and the backward pass of a chunk a linear holds its inputs, or T K numbers of them.

    Args:
        experts: Experts that a linear belongs to, by its name; None if it is not an expert's.
    """

    def __init__(
        self, shard: Shard, rows: ChunkRows, experts: Mapping[str, Experts | None]
    ) -> None:
        self._shard, self._rows, self._experts = shard, rows, experts
        self._found: dict[str, PairedGradient] = {}

    def request(self, linear: Linear, kind: PairedKind) -> Any:
        """Accumulate the statistic of a linear in later passes. Returns the hook, to be removed."""
        module, experts = self._shard.module(linear.name), self._experts[linear.name]
        select = self._rows.select
        found = KINDS[kind](dense_weight(module))
        self._found[linear.name] = found

        def gather(inputs: Tensor) -> Gather:
            images = found.images(select(inputs, rows_of(experts)))

            def add(grad: Tensor, routed: RoutedRows | None) -> None:
                found.update(images, select(grad, routed))

            return add

        return on_gradient(module, experts, gather)

    def of(self, linear: Linear) -> PairedGradient | None:
        """Return the accumulated statistic of a linear, or None."""
        return self._found.get(linear.name)

    def settle(self) -> None:
        """End the accumulation, and free what it alone needs."""
        for found in self._found.values():
            found.settle()

    def forget(self, linear: Linear) -> None:
        """Free the statistic of a linear."""
        self._found.pop(linear.name, None)
