"""Rows of experts in calibration: their tokens, their weights, and a pool for rare ones.

An expert sees only the tokens that are routed to it, in an order of their own. Shape suffixes:
T tokens of a chunk, N rows of a call, C channels.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from orchestrator.device.transport import bring
from orchestrator.linalg.sparsity.magnitude import Magnitude
from orchestrator.models.experts.module import Experts, RoutedRows
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.plan.experts import module_of_experts, reads_tokens
from orchestrator.plan.linear import Linear

POOLED_TOKENS = 32
"""Tokens of the block's mean that are added to the statistics of a rare expert.

They decide little about accuracy. An expert without a token has no energy, and an allocation over
the whole model would cut it to its smallest rank. Of a second moment of inputs they count as one
token more than its own, see `Pools.use`."""


PoolSum = tuple[Tensor, int]
"""Sum over the experts of a block, and its number of tokens."""


class RunningMoment(Protocol):
    """Second moment of rows: a `Gram`, or one that is made from rows."""

    n: int

    @property
    def tokens(self) -> int: ...

    def matrix(self) -> Tensor:
        """Return the matrix, float64 [n, n]."""
        ...

    def flush_writes(self) -> None:
        """End the accumulation."""
        ...


class RealTokens:
    """Tokens of a chunk that are not padding."""

    def __init__(self, chunk: Chunk, device: torch.device) -> None:
        self.index = chunk.index
        """Index of the chunk."""
        self._places_N = chunk.places(device)
        self._mask, self._device = chunk.mask, device
        self._is_real_T: Tensor | None = None

    def rows(self, states: Tensor) -> Tensor:
        """Select the rows [N, C] of states of all tokens [B, T, C]."""
        return rows_at(states, self._places_N)

    def are_real(self, tokens_N: Tensor) -> Tensor | None:
        """Test tokens, by their index in the flattened chunk; None: all of the chunk are real."""
        if self._places_N is None:
            return None
        if self._is_real_T is None:
            # copied for the first expert that needs it
            self._is_real_T = bring(self._mask.reshape(-1), self._device)
        return self._is_real_T[tokens_N]

    def count(self, tokens_N: Tensor) -> int:
        """Count the real ones among tokens."""
        is_real_N = self.are_real(tokens_N)
        return len(tokens_N) if is_real_N is None else int(is_real_N.sum())


class ChunkRows:
    """Rows of the current chunk that belong to real tokens, for any linear of a shard.

    Args:
        is_weighted: Multiply the rows of an expert by the router's weights where `weighted` is
            asked of `select`.
    """

    def __init__(self, shard: Shard, *, is_weighted: bool) -> None:
        self.is_weighted = is_weighted
        self._shard = shard
        self._real: RealTokens | None = None

    def start(self, chunk: Chunk) -> None:
        """Take the mask of a chunk; once per chunk, since all hooks select with the same."""
        self.real = RealTokens(chunk, self._shard.device)

    @property
    def real(self) -> RealTokens:
        """Real tokens of the current chunk."""
        assert self._real is not None
        return self._real

    @real.setter
    def real(self, real: RealTokens) -> None:
        self._real = real

    def select(
        self, states: Tensor, routed: RoutedRows | None = None, *, weighted: bool = False
    ) -> Tensor:
        """Select the rows [N, C] of real tokens from states [..., C], detached.

        Args:
            routed: Rows of the expert whose states these are; None: states of all tokens [B, T, C].
            weighted: The rows are multiplied by the router's weights, in float32: the error of an
                expert's output reaches the residual stream times its weight.
        """
        states = states.detach()
        if routed is None:
            return self.real.rows(states)
        weights_N, is_real_N = routed.weights_N, self.real.are_real(routed.tokens_N)
        if is_real_N is not None:
            states = states[is_real_N]
            weights_N = None if weights_N is None else weights_N[is_real_N]
        if weights_N is None or not (weighted and self.is_weighted):
            return states
        return states.float() * weights_N.detach().float()[:, None]


class Pools:
    """Sums over the experts of a block, of one kind of statistics, for experts with few tokens.

    An expert with fewer tokens than channels, whose second moment is singular, gets the sum of
    `POOLED_TOKENS` mean tokens of all experts in addition. Adding is exact to merge.
    """

    def __init__(self) -> None:
        self._groups: dict[str, str] = {}
        """Group of each pooled statistic, by name."""
        self._sums: dict[str, PoolSum] = {}
        """Sum and number of tokens of groups, once `settle` has fixed them."""
        self._is_settled = False

    def add(self, name: str, group: str) -> None:
        """Pool a statistic with the others of a group."""
        self._groups[name] = group

    def settle(self, statistics: Mapping[str, RunningMoment | Magnitude]) -> None:
        """Compute the sums that are needed, while all statistics are there; once."""
        if self._is_settled:
            return
        self._is_settled = True
        needed = {self._groups[name] for name in self._groups if is_rare(statistics[name])}
        self._sums = {group: self._sum(group, statistics) for group in needed}

    def extend(
        self,
        names: Iterable[str],
        statistics: Mapping[str, RunningMoment | Magnitude],
        earlier: Mapping[str, PoolSum],
    ) -> dict[str, PoolSum]:
        """Add the statistics of experts to the sums over those before them, in place of `settle`.

        Args:
            names: Statistics of a block; those of its groups that are here are added.
            earlier: Sums over the experts before these, by group.

        Returns:
            The sums by group; that of all experts if these are the last.
        """
        own = [self._groups[name] for name in names if name in self._groups]
        groups = dict.fromkeys([*earlier, *own])
        found = {group: self._sum(group, statistics, earlier.get(group)) for group in groups}
        self._sums |= found
        return found

    def is_short(self, name: str, statistics: Mapping[str, RunningMoment | Magnitude]) -> bool:
        """Return True if mean tokens are added to a statistic."""
        return name in self._groups and is_rare(statistics[name])

    def moment(self, name: str, grams: Mapping[str, RunningMoment]) -> tuple[Tensor, int, int]:
        """Return a second moment, with mean tokens if it has few of its own; float64.

        Returns:
            The matrix, the number of rows in the sum, and the most that its rank can be.
        """
        own, added = grams[name], self._added(name, grams)
        if added is None:
            return own.matrix(), own.tokens, own.tokens
        return own.matrix() + added[0], own.tokens + POOLED_TOKENS, added[1]

    def use(self, name: str, statistics: Mapping[str, RunningMoment | Magnitude]) -> float:
        """Return the factor that scales a moment with mean tokens to the use of its expert.

        Mean tokens complete the directions of n tokens of its own, and would count as uses that
        the expert does not have. The scaled sum counts n + 1 tokens: of the next token too it is
        not impossible that it is routed to the expert (the rule of succession).
        """
        own = statistics[name].tokens
        is_pooled = self._added(name, statistics) is not None
        return (own + 1) / (own + POOLED_TOKENS) if is_pooled else 1.0

    def mean(self, name: str, magnitudes: Mapping[str, Magnitude]) -> Tensor:
        """Return a mean magnitude, with mean tokens if it has few of its own; float64."""
        own, added = magnitudes[name], self._added(name, magnitudes)
        if added is None:
            return own.mean()
        return (_total(own) + added[0]) / (own.tokens + POOLED_TOKENS)

    def _added(
        self, name: str, statistics: Mapping[str, RunningMoment | Magnitude]
    ) -> PoolSum | None:
        """Return the sum to add, and the number of rows that it is the mean of; None: no need."""
        if not self.is_short(name, statistics):
            return None
        group = self._groups[name]
        total, tokens = self._sums.get(group) or self._sum(group, statistics)
        return (total * (POOLED_TOKENS / tokens), tokens) if tokens else None

    def _sum(
        self,
        group: str,
        statistics: Mapping[str, RunningMoment | Magnitude],
        earlier: PoolSum | None = None,
    ) -> PoolSum:
        members = [statistics[name] for name in self._groups if self._groups[name] == group]
        if earlier is None:
            first, *members = members
            earlier = _total(first), first.tokens
        total, tokens = earlier
        for each in members:
            total += _total(each)
            tokens += each.tokens
        return total, tokens


def _total(statistic: RunningMoment | Magnitude) -> Tensor:
    """Return the sum over tokens: a second moment, or magnitudes."""
    if isinstance(statistic, Magnitude):
        return statistic.mean() * statistic.tokens
    return statistic.matrix()


def experts_of(shard: Shard, linear: Linear) -> Experts | None:
    """Return the experts that a linear of a shard belongs to; None if it is not an expert's."""
    if linear.role.count(".") < 2:
        return None
    module = shard.module(module_of_experts(linear))
    return module if isinstance(module, Experts) else None


def rows_of(experts: Experts | None) -> RoutedRows | None:
    """Return the rows of the expert that is being called; None outside of experts."""
    return None if experts is None else experts.routed


def is_rare(statistic: RunningMoment | Magnitude) -> bool:
    """Return True if there are fewer tokens than channels."""
    return statistic.tokens < statistic.n


def pool_of(linear: Linear, side: Literal["input", "output"]) -> str:
    """Return the group of statistics that an expert's inputs or outputs are pooled with.

    Gate and up of an expert have one input.
    """
    is_first = side == "input" and reads_tokens(linear)
    part = "gate and up" if is_first else linear.name.rpartition(".")[2]
    return f"{module_of_experts(linear)} {part} {side}"
