"""Inputs of a block's experts as rows, from which the Gram of each is made when it is needed.

Shape suffixes: T tokens of a chunk, N rows of an expert, H hidden channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.linalg.gram import Gram
from orchestrator.models.experts.module import RoutedRows
from orchestrator.models.statistics.routed import ChunkRows, RealTokens
from orchestrator.plan.experts import are_rows_smaller, module_of_experts, reads_tokens, rows_bytes
from orchestrator.plan.linear import Linear

Gather = Callable[[Gram, Tensor, RoutedRows], None]
"""Adds the statistics of an expert's rows [N, H] of the current chunk to a Gram."""


@dataclass(frozen=True, slots=True)
class _Passed:
    """One chunk as the experts of a block have received it."""

    real: RealTokens
    states_TH: Tensor | None
    """Input of the experts; None: every expert has rows of its own."""
    routed: dict[str, RoutedRows] = field(default_factory=dict)
    """Rows of each expert."""
    own: dict[str, Tensor] = field(default_factory=dict)
    """Rows [N, H] of each expert, if it has its own."""


class ExpertRows:
    """Inputs of the experts of one block, chunk by chunk, with the tokens of each expert.

    The input of a chunk is kept once, in the dtype of the pass, and not again when the chunk passes
    again for another label. Where inputs contain the scores (Llama 4) the rows of every expert are
    kept as they are.

    Args:
        rows: Selects the rows of real tokens; it is set to each chunk that is read again.
    """

    def __init__(self, rows: ChunkRows) -> None:
        self._rows = rows
        self._passed: dict[int, _Passed] = {}
        self._order: list[int] = []
        """Indices of the chunks in the order in which they have passed."""
        self._current: RealTokens | None = None

    def keep(self, expert: str, states_NH: Tensor, routed: RoutedRows) -> None:
        """Keep the rows of an expert of the current chunk."""
        real, states_TH = self._rows.real, routed.states_TH
        if self._current is not real:
            self._current = real
            self._order.append(real.index)
        if real.index not in self._passed:
            kept_TH = None if states_TH is None else states_TH.detach().clone()
            self._passed[real.index] = _Passed(real, kept_TH)
        passed = self._passed[real.index]
        weights_N = routed.weights_N
        if weights_N is not None:
            weights_N = weights_N.detach() if self._rows.is_weighted else None
        passed.routed[expert] = RoutedRows(routed.tokens_N, weights_N)
        if states_TH is None:
            passed.own[expert] = states_NH.detach()

    def tokens(self, expert: str) -> int:
        """Number of rows of real tokens of an expert; a chunk counts whenever it has passed."""
        counts = {index: _count(each, expert) for index, each in self._passed.items()}
        return sum(counts[index] for index in self._order)

    @torch.no_grad()
    def replay(self, expert: str, gram: Gram, gather: Gather) -> None:
        """Gather the rows of an expert, chunk by chunk in the order in which they have passed."""
        for passed in map(self._passed.__getitem__, self._order):
            routed = passed.routed.get(expert)
            if routed is None:
                continue
            states_TH = passed.states_TH
            of_expert = passed.own[expert] if states_TH is None else states_TH[routed.tokens_N]
            self._rows.real = passed.real
            gather(gram, of_expert, routed)


def empty_rows(
    rows: ChunkRows,
    grams: Mapping[Linear, tuple[str, int]],
    *,
    tokens: int | None,
    itemsize: int,
) -> dict[str, ExpertRows]:
    """Return empty rows for the experts that have rows in place of Grams, by their module.

    Args:
        rows: See `ExpertRows`.
        grams: Source and channels of the Gram of every linear of an expert.
        tokens: Tokens of all chunks; None: unknown, so that there are no rows.
        itemsize: Bytes of a value in the pass.
    """
    inputs: dict[str, int] = {}
    channels: dict[str, dict[str, int]] = {}
    for linear, (source, size) in grams.items():
        if tokens is not None and reads_tokens(linear):
            module = module_of_experts(linear)
            inputs[module] = rows_bytes(tokens, linear.in_features, itemsize)
            channels.setdefault(module, {})[source] = size
    return {
        module: ExpertRows(rows)
        for module, size in inputs.items()
        if are_rows_smaller(size, channels[module].values())
    }


class GramOfRows:
    """Gram of one expert that is made from rows, with the bits of one gathered as chunks pass.

    Every use costs all of its products. It holds no memory beside the rows, which the experts of a
    block share.
    """

    def __init__(
        self, empty: Callable[[], Gram], n: int, *, rows: ExpertRows, expert: str, gather: Gather
    ) -> None:
        self.n = n
        self._empty, self._rows, self._expert, self._gather = empty, rows, expert, gather

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return self._rows.tokens(self._expert)

    def made(self) -> Gram:
        """Return the Gram, which takes no more rows: 12 n^2 bytes as it is made, 8 n^2 then."""
        gram = self._empty()
        self._rows.replay(self._expert, gram, self._gather)
        gram.flush_writes()
        return gram

    def matrix(self) -> Tensor:
        """Return H, as `Gram.matrix`."""
        return self.made().matrix()

    def flush_writes(self) -> None:
        """Keep the rows: there is no sum to free."""


def _count(passed: _Passed, expert: str) -> int:
    routed = passed.routed.get(expert)
    if routed is None:
        return 0
    return passed.real.count(routed.tokens_N)
