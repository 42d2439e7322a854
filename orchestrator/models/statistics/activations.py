"""Activations of experts, gathered in the place of Grams; see `linalg.activation`."""

from collections.abc import Sequence

from torch import Tensor, nn

from orchestrator.linalg.activation import Activation
from orchestrator.models.statistics.calibration import Calibration, Side
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.statistics.routed import rows_of
from orchestrator.plan.experts import expert_name
from orchestrator.plan.linear import Linear


class ActivationCalibration(Calibration):
    """Mean norm of the outputs of every expert times the router's weights, over its real tokens.

    All linears of an expert have this one statistic. Where the router scales the inputs of experts
    in place of their outputs, the norm is that of the output for the scaled input.
    """

    def _request(self, linear: Linear, side: Side) -> None:
        module, experts = self._shard.module(linear.name), self._experts[linear.name]
        if experts is None:
            raise ValueError(f"{linear.name} is not an expert's; only experts have activations")
        device = dense_weight(module).device
        activation = self._activations.setdefault(expert_name(linear), Activation(device))
        if not linear.name.endswith(".down"):
            return

        def gather(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            activation.update(self._rows.select(output, rows_of(experts), weighted=True))

        self._hooks.append(module.register_forward_hook(gather))

    def statistic(self, linear: Linear) -> Activation:  # type: ignore[override] # in place of Grams
        """Return the activation of the expert that a linear belongs to."""
        return self._activations[expert_name(linear)]

    def expert_tokens(self, linears: Sequence[Linear]) -> dict[str, int]:
        """Return the number of tokens of the experts of linears; see `Calibration`."""
        return {expert_name(each): self.statistic(each).tokens for each in linears}

    def forget(self, linears: Sequence[Linear]) -> None:
        """Keep the statistics: they are one number for each expert."""
