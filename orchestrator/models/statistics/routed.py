"""Rows of experts in calibration: their tokens, their weights, and a pool for rare ones.

An expert sees only the tokens that are routed to it, in an order of their own. Shape suffixes:
T tokens of a chunk, N rows of a call, C channels.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from orchestrator.device.transport import bring
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.magnitude import Magnitude
from orchestrator.models.experts.module import Experts, RoutedRows
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.plan.linear import Linear

POOLED_TOKENS = 32
"""Tokens of the block's mean that are added to the statistics of a rare expert.

They decide little about accuracy. An expert without a token has no energy, and an allocation over
the whole model would cut it to its smallest rank. Of a second moment of inputs they count as one
token more than its own, see `Pools.use`."""


class ChunkRows:
    """Rows of the current chunk that belong to real tokens, for any linear of a shard.

    Args:
        is_weighted: Multiply the rows of an expert by the router's weights where `weighted` is
            asked of `select`.
    """

    def __init__(self, shard: Shard, *, is_weighted: bool) -> None:
        self._shard, self._is_weighted = shard, is_weighted
        self._places_N: Tensor | None = None
        self._mask: Tensor | None = None
        self._is_real_T: Tensor | None = None

    def start(self, chunk: Chunk) -> None:
        """Take the mask of a chunk; once per chunk, since all hooks select with the same."""
        self._places_N = chunk.places(self._shard.device)
        self._mask, self._is_real_T = chunk.mask, None

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
            return rows_at(states, self._places_N)
        weights_N = routed.weights_N
        if self._places_N is not None:
            is_real_N = self._is_real()[routed.tokens_N]
            states = states[is_real_N]
            weights_N = None if weights_N is None else weights_N[is_real_N]
        if weights_N is None or not (weighted and self._is_weighted):
            return states
        return states.float() * weights_N.detach().float()[:, None]

    def _is_real(self) -> Tensor:
        """Mask [B T] of the chunk on the device, copied for the first expert that needs it."""
        if self._is_real_T is None:
            assert self._mask is not None
            self._is_real_T = bring(self._mask.reshape(-1), self._shard.device)
        return self._is_real_T


class Pools:
    """Sums over the experts of a block, of one kind of statistics, for experts with few tokens.

    An expert with fewer tokens than channels, whose second moment is singular, gets the sum of
    `POOLED_TOKENS` mean tokens of all experts in addition. Adding is exact to merge.
    """

    def __init__(self) -> None:
        self._groups: dict[str, str] = {}
        """Group of each pooled statistic, by name."""
        self._sums: dict[str, tuple[Tensor, int]] = {}
        """Sum and number of tokens of groups, once `settle` has fixed them."""
        self._is_settled = False

    def add(self, name: str, group: str) -> None:
        """Pool a statistic with the others of a group."""
        self._groups[name] = group

    def settle(self, statistics: Mapping[str, Gram | Magnitude]) -> None:
        """Compute the sums that are needed, while all statistics are there; once."""
        if self._is_settled:
            return
        self._is_settled = True
        needed = {self._groups[name] for name in self._groups if is_rare(statistics[name])}
        self._sums = {group: self._sum(group, statistics) for group in needed}

    def moment(self, name: str, grams: Mapping[str, Gram]) -> tuple[Tensor, int, int]:
        """Return a second moment, with mean tokens if it has few of its own; float64.

        Returns:
            The matrix, the number of rows in the sum, and the most that its rank can be.
        """
        own, added = grams[name], self._added(name, grams)
        if added is None:
            return own.matrix(), own.tokens, own.tokens
        return own.matrix() + added[0], own.tokens + POOLED_TOKENS, added[1]

    def use(self, name: str, statistics: Mapping[str, Gram | Magnitude]) -> float:
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
        self, name: str, statistics: Mapping[str, Gram | Magnitude]
    ) -> tuple[Tensor, int] | None:
        """Return the sum to add, and the number of rows that it is the mean of; None: no need."""
        group = self._groups.get(name)
        if group is None or not is_rare(statistics[name]):
            return None
        total, tokens = self._sums.get(group) or self._sum(group, statistics)
        return (total * (POOLED_TOKENS / tokens), tokens) if tokens else None

    def _sum(self, group: str, statistics: Mapping[str, Gram | Magnitude]) -> tuple[Tensor, int]:
        first, *others = (statistics[name] for name in self._groups if self._groups[name] == group)
        total, tokens = _total(first), first.tokens
        for each in others:
            total += _total(each)
            tokens += each.tokens
        return total, tokens


def _total(statistic: Gram | Magnitude) -> Tensor:
    """Return the sum over tokens: a second moment, or magnitudes."""
    if isinstance(statistic, Gram):
        return statistic.matrix()
    return statistic.mean() * statistic.tokens


def experts_of(shard: Shard, linear: Linear) -> Experts | None:
    """Return the experts that a linear of a shard belongs to; None if it is not an expert's."""
    if linear.role.count(".") < 2:
        return None
    module = shard.module(module_of_experts(linear))
    return module if isinstance(module, Experts) else None


def rows_of(experts: Experts | None) -> RoutedRows | None:
    """Return the rows of the expert that is being called; None outside of experts."""
    return None if experts is None else experts.routed


def is_rare(statistic: Gram | Magnitude) -> bool:
    """Return True if there are fewer tokens than channels."""
    return statistic.tokens < statistic.n


def expert_name(linear: Linear) -> str:
    """Return the name of the module of the expert that a linear belongs to."""
    return linear.name.rpartition(".")[0]


def module_of_experts(linear: Linear) -> str:
    """Return the name of the module of experts that an expert's linear belongs to."""
    return linear.name.rsplit(".", 2)[0]


def pool_of(linear: Linear, side: Literal["input", "output"]) -> str:
    """Return the group of statistics that an expert's inputs or outputs are pooled with.

    Gate and up of an expert have one input.
    """
    part = linear.name.rpartition(".")[2]
    is_first = side == "input" and part != "down"
    return f"{module_of_experts(linear)} {'gate and up' if is_first else part} {side}"
