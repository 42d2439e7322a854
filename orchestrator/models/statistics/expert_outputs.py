"""Mean outputs of experts over all tokens, gathered in the place of Grams.

Shape suffixes: T tokens, E experts, H hidden, K experts of a token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orchestrator.linalg.activation import MeanRow, OutputDistances, distances
from orchestrator.models.experts.module import Experts
from orchestrator.models.statistics.calibration import Calibration, Side
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.plan.experts import expert_name, module_of_experts
from orchestrator.plan.linear import Linear


class OutputsCalibration(Calibration):
    """Mean output of every expert over all real tokens, and the number of those routed to it.

    Where the router scales the inputs of experts, so are those of the outputs, and tokens that are
    not routed to an expert have outputs of 0. Cost: every expert of a block runs on every token.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._means: dict[str, list[MeanRow]] = {}
        """Outputs by experts module and expert."""
        self._routed: dict[str, Tensor] = {}
        """Tokens of each expert, int64 [E] on the host, by experts module."""
        super().__init__(*arguments, **options)

    def _request(self, linear: Linear, side: Side) -> None:
        experts, name = self._experts[linear.name], module_of_experts(linear)
        if experts is None:
            raise ValueError(f"{linear.name} is not an expert's; only experts have mean outputs")
        if name not in self._means:
            device = dense_weight(self._shard.module(linear.name)).device
            hidden, count = experts.layout.hidden, experts.num_experts
            self._means[name] = [MeanRow(hidden, device) for _ in range(count)]
            self._routed[name] = torch.zeros(count, dtype=torch.int64)
            gather = partial(self._gather, name)
            self._hooks.append(experts.register_forward_pre_hook(gather, with_kwargs=True))

    def _gather(
        self, name: str, experts: Experts, given: tuple[Tensor, ...], named: dict[str, Any]
    ) -> None:
        arguments: list[Tensor] = [*given, *named.values()]
        states, routing = arguments[0], arguments[1:]
        counts_E = self._routed[name]
        if experts.layout.takes_scored_inputs:
            states_ETH = states.view(experts.num_experts, -1, experts.layout.hidden)
            for expert, mean in enumerate(self._means[name]):
                rows_TH = self._rows.select(states_ETH[expert])
                is_routed_T = rows_TH.ne(0).any(dim=-1)
                counts_E[expert] += int(is_routed_T.sum())
                zeros = len(rows_TH) - int(is_routed_T.sum())
                mean.update(experts.output(expert, rows_TH[is_routed_T]), zeros=zeros)
            return
        rows_TH = self._rows.select(states)
        chosen_TK = self._rows.select(routing[0])
        counts_E += torch.bincount(chosen_TK.flatten(), minlength=len(counts_E)).cpu()
        for expert, mean in enumerate(self._means[name]):
            mean.update(experts.output(expert, rows_TH))

    def statistic(self, linear: Linear) -> OutputDistances:  # type: ignore[override] # no Gram
        """Return the tokens of the expert that a linear belongs to; of `down` the distances too."""
        name, expert = _place(linear)
        apart_E = torch.zeros(0, dtype=torch.float64)
        if linear.name.endswith(".down"):
            means_EH = torch.stack([each.mean() for each in self._means[name]])
            apart_E = distances(means_EH, expert)
        return OutputDistances(apart_E, int(self._routed[name][expert]))

    def expert_tokens(self, linears: Sequence[Linear]) -> dict[str, int]:
        """Return the number of tokens of the experts of linears; see `Calibration`."""
        places = {expert_name(each): _place(each) for each in linears}
        return {each: int(self._routed[name][expert]) for each, (name, expert) in places.items()}

    def forget(self, linears: Sequence[Linear]) -> None:
        """Keep the statistics: they are one row for each expert."""


def _place(linear: Linear) -> tuple[str, int]:
    """Return the name of the experts module of a linear, and the number of the expert in it."""
    return module_of_experts(linear), int(expert_name(linear).rpartition(".")[2])
