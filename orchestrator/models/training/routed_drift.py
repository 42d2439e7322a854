"""Inputs of experts in the dense and the compressed model, paired by token, for compensation.

Shape suffixes: N rows of an expert, I inputs.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from orchestrator.linalg.compensate import DriftGram
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.routed import experts_of
from orchestrator.models.training.compensation_options import SITE_BYTES, TOGETHER_BYTES
from orchestrator.plan.experts import module_of_experts
from orchestrator.plan.linear import Linear


class TokenRows(NamedTuple):
    """Inputs of an expert's linear for the real tokens that are routed to it."""

    rows_NI: Tensor
    tokens_N: Tensor
    """Token of each row, ascending, as an index into the flattened [B T]."""


def split_sites(shard: Shard, linears: Sequence[Linear]) -> Iterator[list[str]]:
    """Yield the sites of a block in the order of computation, those of experts together.

    The first linears of all experts of a module read one state, and no expert's `down` has an input
    that depends on another expert, so one pass of the chunks serves many of them.
    """
    first = {linear.site: linear for linear in reversed(linears)}
    together: dict[tuple[str, bool], list[str]] = {}
    for site in dict.fromkeys(each.site for each in linears):
        linear = first[site]
        if experts_of(shard, linear) is None:
            yield from _cut(first, together)
            together = {}
            yield [site]
            continue
        key = module_of_experts(linear), linear.name.endswith(".down")
        together.setdefault(key, []).append(site)
    yield from _cut(first, together)


def gather_routed(
    dense: Shard | None,
    compressed: Shard,
    linears: Sequence[Linear],
    *,
    dense_inputs: Sequence[Chunk],
    inputs: Sequence[Chunk],
) -> dict[str, DriftGram]:
    """Accumulate the moments of the inputs of experts' linears, over all chunks in order.

    The dense and the compressed model may route a token to different experts. Where both inputs
    count, those tokens do that both models route to the expert.

    Args:
        linears: One linear of each site.
        dense: None: the objective does not depend on the dense model.

    Returns:
        The moments by site.
    """
    found = RoutedReader(compressed, linears)
    grams = {each.site: DriftGram(each.in_features, compressed.device) for each in linears}
    with found:
        if dense is None:
            for chunk in inputs:
                for site, rows in found.read(chunk).items():
                    grams[site].update(rows.rows_NI)
            return grams
        with RoutedReader(dense, linears) as wanted:
            for chunk, dense_chunk in zip(inputs, dense_inputs, strict=True):
                others = wanted.read(dense_chunk)
                for site, rows in found.read(chunk).items():
                    if site in others:
                        grams[site].update(*_paired(rows, others[site]))
    return grams


class RoutedReader:
    """Context manager that runs a shard and returns the inputs of linears of experts."""

    def __init__(self, shard: Shard, linears: Sequence[Linear]) -> None:
        self._shard, self._linears = shard, linears
        self._hooks: list[Any] = []
        self._found: dict[str, TokenRows] = {}

    def __enter__(self) -> Self:
        for linear in self._linears:
            experts = experts_of(self._shard, linear)
            assert experts is not None

            def keep(
                module: nn.Module,
                inputs: tuple[Tensor, ...],
                site: str = linear.site,
                experts: Any = experts,
            ) -> None:
                self._found[site] = TokenRows(inputs[0].detach(), experts.routed.tokens_N)

            module = self._shard.module(linear.name)
            self._hooks.append(module.register_forward_pre_hook(keep))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def read(self, chunk: Chunk) -> dict[str, TokenRows]:
        """Return the inputs of a chunk's real tokens, by site; experts without a token are left
        out."""
        self._found = {}
        self._shard.forward(chunk)
        found, self._found = self._found, {}
        places_N = chunk.places(self._shard.device)
        if places_N is None:
            return found
        return {
            site: _selected(rows, torch.isin(rows.tokens_N, places_N))
            for site, rows in found.items()
        }


def _cut(
    first: dict[str, Linear], together: dict[tuple[str, bool], list[str]]
) -> Iterator[list[str]]:
    """Cut sites that are gathered together so that their moments fit: all first linears, then
    `down`."""
    for (_, _), sites in sorted(together.items(), key=lambda item: item[0][1]):
        bytes_ = SITE_BYTES * first[sites[0]].in_features ** 2
        count = max(1, TOGETHER_BYTES // bytes_)
        for start in range(0, len(sites), count):
            yield sites[start : start + count]


def _selected(rows: TokenRows, mask_N: Tensor) -> TokenRows:
    return TokenRows(rows.rows_NI[mask_N], rows.tokens_N[mask_N])


def _paired(found: TokenRows, wanted: TokenRows) -> tuple[Tensor, Tensor]:
    """Return the rows of the tokens that both have, in the order of the tokens."""
    both = torch.isin(found.tokens_N, wanted.tokens_N), torch.isin(wanted.tokens_N, found.tokens_N)
    return found.rows_NI[both[0]], wanted.rows_NI[both[1]]
