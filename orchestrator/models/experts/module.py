"""Module that runs the experts of a block one by one, each as ordinary linears.

Hooks, forms, statistics and training then see every matrix of an expert as an `nn.Linear` of its
own, `experts.17.down`.

Shape suffixes: T tokens, K experts of a token, S = T K, E experts, N rows of one expert, H hidden.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from orchestrator.models.experts.layout import ExpertsLayout


class RoutedRows(NamedTuple):
    """Rows that an expert receives in the call under way."""

    tokens_N: Tensor
    """Token of each row, as an index into the flattened [B T], int64."""
    weights_N: Tensor | None
    """Router's weight by which the row's output is multiplied; None: the inputs contain it."""
    states_TH: Tensor | None = None
    """Input of the experts, whose rows `tokens_N` these are; None: every expert has its own."""


class ExpertLinear(nn.Linear):
    """Linear of an expert: the product is rounded before the bias is added, as in `grouped_mm`.

    In 16 bits a fused addition rounds once less, which changes the routing of later blocks. Its
    values are uninitialised; they come from a checkpoint or from fused tensors.
    """

    def reset_parameters(self) -> None:
        """Leave the values as they are: random numbers for thousands of experts take seconds."""

    def forward(self, input: Tensor) -> Tensor:
        product = linear(input, self.weight)
        return product if self.bias is None else product + self.bias


class Experts(nn.Module):
    """Experts of a block: children `0`, `1`, ... with linears `gate`, `up` and `down`.

    Takes the arguments of the fused module that it replaces and returns what that returns. Order
    of computation is that of `grouped_mm`, the default of transformers: rows sorted by expert, one
    product for each, then for every token the sum over its experts in the order of the router.
    Logits are equal to it bit for bit in float32 and bfloat16 on the CPU.

    The activation is the fused module's own: `native` is that module without its parameters, held
    outside of the child modules, so it has no name and no tensor.

    An expert without a weight is dropped: it is not called, and its output is 0 for the tokens that
    choose it. A router without its row chooses among the others; E is then their number.

    Cost: 3 products for every expert with at least one row, and one copy of the chosen rows; on a
    GPU one wait for the counts. On the meta device, where routing has no values, every expert
    is called once with one row.
    """

    def __init__(self, native: nn.Module, layout: ExpertsLayout) -> None:
        super().__init__()
        self.layout = layout
        self.num_experts = layout.num_experts
        self.numbers = tuple(range(layout.num_experts))
        """Number of the expert that each row of the router is for."""
        self.routed: RoutedRows | None = None
        """Rows of the expert that is being called, for forward hooks on its linears; else None."""
        bare = copy.copy(native)
        bare._parameters = {}
        self.__dict__["native"] = bare
        like = native.get_parameter("down_proj")
        for expert in range(layout.num_experts):
            child = nn.Module()
            for part in layout.parts:
                inputs, outputs = layout.features(part)
                child.add_module(
                    part,
                    ExpertLinear(
                        inputs, outputs, bias=layout.has_bias, device=like.device, dtype=like.dtype
                    ),
                )
            self.add_module(str(expert), child)

    def copy_values(self, native: nn.Module) -> None:
        """Copy the values of a fused module of the same layout, in its dtype and on its device."""
        layout = self.layout
        for expert, linears in enumerate(self.children()):
            for part in layout.parts:
                for kind in layout.kinds:
                    fused = native.get_parameter(layout.fused_name(part, kind)).detach()
                    taken = layout.without_gaps(kind, layout.take(part, kind, fused[expert]))
                    setattr(linears.get_submodule(part), kind, nn.Parameter(taken.clone()))

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        """Run the experts on the tokens that the router chose for them.

        Args:
            hidden_states: [T, H]; [E T, H] times the scores if the layout takes scored inputs.
            routing, named: Indices [T, K] and weights [T, K] of the chosen experts, in this order,
                under any names; none with scored inputs.

        Returns:
            [T, H], or [E T, H] with scored inputs, in the dtype of the inputs.
        """
        if hidden_states.is_meta:
            return self._call_each(hidden_states)
        if self.layout.takes_scored_inputs:
            return self._run_scored(hidden_states)
        index_TK, weights_TK = (*routing, *named.values())
        return self._run_routed(hidden_states, index_TK, weights_TK)

    def is_dropped(self, expert: int) -> bool:
        """Test if an expert has no weight."""
        return self.get_submodule(f"{expert}.down").weight is None

    def _run_routed(self, states_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tokens, choices = index_TK.shape
        chosen_S, weights_S = index_TK.reshape(-1), weights_TK.reshape(-1)
        order_S = torch.argsort(chosen_S, stable=True)
        counts = torch.bincount(chosen_S, minlength=len(self.numbers)).tolist()
        parts = dict(zip(self.numbers, torch.split(order_S, counts), strict=True))
        called = {expert: places_N for expert, places_N in parts.items() if len(places_N)}
        gone = [called.pop(expert) for expert in [*called] if self.is_dropped(expert)]
        if not called:
            return torch.zeros_like(states_TH)
        if gone:
            order_S = torch.cat([*called.values(), *gone])
        routed = {
            expert: RoutedRows(places_N // choices, weights_S[places_N], states_TH)
            for expert, places_N in called.items()
        }
        outputs = [
            self._before_activation(expert, states_TH[rows.tokens_N], rows)
            for expert, rows in routed.items()
        ]
        # of all rows at once, as in `grouped_mm`: the bits of some functions depend on the place of
        # a value in its tensor
        inner_SI = self._activate([torch.cat(each) for each in zip(*outputs, strict=True)])
        inners = torch.split(inner_SI, [len(rows.tokens_N) for rows in routed.values()])
        pairs = zip(routed.items(), inners, strict=True)
        output_SH = torch.cat([self._down(expert, inner, rows) for (expert, rows), inner in pairs])
        if gone:
            output_SH = pad(output_SH, (0, 0, 0, len(order_S) - len(output_SH)))
        output_SH = output_SH * weights_S[order_S, None]
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        summed_TH = output_SH[inverse_S].view(tokens, choices, -1).sum(dim=1)
        return summed_TH.to(states_TH.dtype)

    def _run_scored(self, states: Tensor) -> Tensor:
        states_ETH = states.view(len(self.numbers), -1, self.layout.hidden)
        outputs = []
        for expert, states_TH in zip(self.numbers, states_ETH, strict=True):
            (tokens_N,) = states_TH.ne(0).any(dim=-1).nonzero(as_tuple=True)
            output_TH = torch.zeros_like(states_TH)
            if len(tokens_N) and not self.is_dropped(expert):
                output_NH = self._run(expert, states_TH[tokens_N], RoutedRows(tokens_N, None))
                output_TH = output_TH.index_put((tokens_N,), output_NH)
            outputs.append(output_TH)
        return torch.cat(outputs)

    def _call_each(self, states: Tensor) -> Tensor:
        """Call every expert with a row of its own."""
        rows = RoutedRows(torch.zeros(1, dtype=torch.int64, device=states.device), None)
        for expert in range(self.num_experts):
            self._run(expert, states[:1].clone(), rows)
        return torch.empty_like(states)

    def output(self, expert: int, states_NH: Tensor) -> Tensor:
        """Compute the output [N, H] of one expert for any rows, wherever the router sends them."""
        rows = torch.arange(len(states_NH), device=states_NH.device)
        return self._run(expert, states_NH, RoutedRows(rows, None))

    def _run(self, expert: int, states_NH: Tensor, rows: RoutedRows) -> Tensor:
        """Compute the output [N, H] of one expert, without the router's weights."""
        inner_NI = self._activate(self._before_activation(expert, states_NH, rows))
        return self._down(expert, inner_NI, rows)

    def _before_activation(self, expert: int, states_NH: Tensor, rows: RoutedRows) -> list[Tensor]:
        """Compute the outputs of an expert's linears but `down`, each [N, I]."""
        linears = self.get_submodule(str(expert))
        with self._routing(rows):
            return [linears.get_submodule(part)(states_NH) for part in self.layout.parts[:-1]]

    def _down(self, expert: int, inner_NI: Tensor, rows: RoutedRows) -> Tensor:
        with self._routing(rows):
            output_NH: Tensor = self.get_submodule(f"{expert}.down")(inner_NI)
        return output_NH

    def _activate(self, outputs: list[Tensor]) -> Tensor:
        """Compute the input of `down` from the outputs of gate and up, or up alone."""
        native: Any = self.__dict__["native"]
        activated: Tensor
        if not self.layout.has_gate:
            activated = native.act_fn(*outputs)
        elif not hasattr(native, "_apply_gate"):
            gate, up = outputs
            activated = up * native.act_fn(gate)
        elif self.layout.is_concatenated:
            activated = native._apply_gate(torch.cat(outputs, dim=-1))
        else:
            activated = native._apply_gate(torch.stack(outputs, dim=-1).flatten(-2))
        return activated

    @contextmanager
    def _routing(self, rows: RoutedRows) -> Iterator[None]:
        self.routed = rows
        try:
            yield
        finally:
            self.routed = None
