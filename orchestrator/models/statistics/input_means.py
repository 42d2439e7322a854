"""Means of the inputs of linears by groups of sequences, gathered beside their Grams."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from orchestrator.linalg.group_sums import GroupSums
from orchestrator.linalg.low_rank import InputMeans, Statistic
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.plan.linear import Linear

GROUP = 32
"""Consecutive sequences of a group; the number of the authors of 2405.10616."""


class MeansCalibration(Calibration):
    """Statistics of `Calibration`, and the sums of the inputs of every site.

    Linears of a site share one set of sums. Cost: T I additions a chunk, and 8 I bytes a group.
    Linears of experts are refused: rows of their Grams carry the router's weights.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._sums: dict[str, GroupSums] = {}
        super().__init__(*arguments, **options)

    def _request(self, linear: Linear, side: Any) -> None:
        super()._request(linear, side)
        if self._experts[linear.name] is not None:
            raise ValueError(f"{linear.name} is an expert's; experts have no means of inputs")
        if linear.site in self._sums:
            return
        module = self._shard.module(linear.name)
        sums = self._sums[linear.site] = GroupSums(
            linear.in_features, dense_weight(module).device, size=GROUP
        )

        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums.update(self._select(linear, inputs[0], None), self._rows.real.index)

        self._hooks.append(module.register_forward_pre_hook(gather))

    def statistic(self, linear: Linear) -> Statistic:
        """Return the accumulated statistics of one linear, with means and its bias."""
        sums_GI, tokens_G = self._sums[linear.site].sums()
        bias = self._shard.module(linear.name).bias
        bias_O = bias.detach().double() if isinstance(bias, Tensor) else None
        return replace(super().statistic(linear), means=InputMeans(sums_GI, tokens_G, bias_O))

    def close(self) -> None:
        super().close()
        self._sums = {}
