"""Compensation: refit a compressed block to the dense block's outputs on its actual inputs.

Shape suffixes: B sequences, T tokens, O outputs, I inputs, R rank, C channels, N real tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from orchestrator.device.transport import bring
from orchestrator.linalg.compensate import (
    Basis,
    Drift,
    DriftGram,
    Factors,
    compensate,
    input_map,
)
from orchestrator.linalg.pivot import pivot
from orchestrator.models.forms.base import Factored, FormLinear
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.models.statistics.routed import experts_of
from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.models.training.routed_drift import gather_routed, split_sites
from orchestrator.plan.linear import Linear


def compensate_block(
    dense: Shard,
    compressed: Shard,
    *,
    dense_inputs: Sequence[Chunk],
    inputs: Sequence[Chunk],
    linears: Sequence[Linear],
    options: CompensationOptions,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Refit the factors of a block's linears in place; see `linalg.compensate`.

    Sites are processed in call order, because a site's inputs depend on the preceding linears:
    q, k, v, then o, then gate and up, then down. For each site the chunks pass once through both
    blocks, up to that site, or for the sites of many experts (`split_sites`). Statistics cover the
    tokens inside the mask.

    Memory besides the two blocks: the moments of one site, at most 56 bytes per squared channel;
    46 GB for the widest site of a 70B block.

    Args:
        dense_inputs: Chunks at the dense block's input.
        inputs: The same chunks at the compressed block's input.
        linears: The block's linears in call order; those without factors are not changed.

    Returns:
        The changed tensors of the shard, by their names in the model; and the measurements of each
        linear that has factors.
    """
    changed: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    found = {each.name: _factored(compressed.module(each.name)) for each in linears}
    modules = {name: module for name, module in found.items() if module is not None}
    fitted = [each for each in linears if each.name in modules]
    at_site: dict[str, list[Linear]] = {}
    for each in fitted:
        at_site.setdefault(each.site, []).append(each)
    chunks = {"dense_inputs": dense_inputs, "inputs": inputs}
    for sites in split_sites(compressed, fitted):
        firsts = [at_site[site][0] for site in sites]
        for site, drift in _drifts(dense, compressed, firsts, options=options, **chunks):
            mapped = input_map(drift, options.dense_part, options.damping)
            for linear in at_site[site]:
                module = modules[linear.name]
                result = compensate(
                    dense_weight(dense.module(linear.name)),
                    _factors(module),
                    drift,
                    mapped,
                    beta=options.dense_part,
                    basis=cast(Basis, options.basis),
                )
                facts[linear.name] = result.report
                if result.taken:
                    left_OR = result.factors.left_OR if options.basis == "new" else None
                    stored = module.set_factors(left_OR, result.factors.down_RI, pivot=_pivot)
                    changed |= {f"{linear.name}.{name}": tensor for name, tensor in stored.items()}
    return changed, facts


def _drifts(
    dense: Shard,
    compressed: Shard,
    linears: Sequence[Linear],
    *,
    dense_inputs: Sequence[Chunk],
    inputs: Sequence[Chunk],
    options: CompensationOptions,
) -> Iterator[tuple[str, Drift]]:
    """Gather the moments of the inputs of linears, one of each site, and yield them by site.

    An expert with fewer tokens than inputs is left out: a map fitted to them would fit no others.
    """
    chunks = {"dense_inputs": dense_inputs, "inputs": inputs}
    if experts_of(compressed, linears[0]) is None:
        for linear in linears:
            yield linear.site, gather_drift(dense, compressed, linear, options=options, **chunks)
        return
    grams = gather_routed(dense if options.dense_part else None, compressed, linears, **chunks)
    for linear in linears:
        gram = grams.pop(linear.site)
        if gram.tokens >= linear.in_features:
            yield linear.site, gram.drift()


def _factored(module: nn.Module) -> Factored | None:
    """Return the module if it has factors to refit; None for others, dense ones too."""
    return module.factored() if isinstance(module, FormLinear) else None


def _factors(module: Factored) -> Factors:
    left_OR, right_RI = module.left_factor(), module.right_factor()
    return Factors(left_OR=left_OR, down_RI=right_RI, rest_OI=module.rest())


def _pivot(left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write a product as pivots and combinations; see `models.forms.base.Pivot`."""
    found = pivot(left_OR, right_RI)
    return found.weight_SR, found.down_RI, found.order_O


def gather_drift(
    dense: Shard,
    compressed: Shard,
    linear: Linear,
    *,
    dense_inputs: Sequence[Chunk],
    inputs: Sequence[Chunk],
    options: CompensationOptions,
) -> Drift:
    """Accumulate the moments of a linear's inputs in both models, over all chunks in order.

    The dense model is run only if the objective depends on it.
    """
    found = Reader(compressed, linear.name)
    gram = DriftGram(linear.in_features, found.device)
    if not options.dense_part:
        with found:
            for chunk in inputs:
                gram.update(found.read(chunk))
        return gram.drift()
    with found, Reader(dense, linear.name) as wanted:
        for chunk, dense_chunk in zip(inputs, dense_inputs, strict=True):
            gram.update(found.read(chunk), wanted.read(dense_chunk))
    return gram.drift()


class Reader:
    """Context manager that runs a shard up to one of its linears and returns the linear's input."""

    def __init__(self, shard: Shard, name: str) -> None:
        self._shard = shard
        self._module = shard.module(name)
        self._hook: Any = None

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    def __enter__(self) -> Self:
        self._hook = self._module.register_forward_pre_hook(_stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hook.remove()

    def read(self, chunk: Chunk) -> Tensor:
        """Return the linear's input rows [T, I] for a chunk's tokens inside the mask."""
        try:
            self._shard.forward(chunk)
        except _SiteReached as reached:
            return rows_at(reached.states, chunk.places(reached.states.device))
        raise AssertionError(f"blocks {self._shard.blocks} did not reach the linear")


class _SiteReached(BaseException):
    """Ends a forward pass from inside; not an `Exception`, so that no model's code catches it."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> NoReturn:
    raise _SiteReached(inputs[0].detach())


def squared_error(found: Chunk, target: Chunk) -> tuple[int, Tensor]:
    """Count the values of the residual stream inside the mask and sum their squared differences.

    The sum is a float64 tensor [] left on the device of `found`; `read_errors` transfers those of
    many chunks to the host at once. Temporary memory: 16 bytes per value.
    """
    assert found.payload is not None
    assert target.payload is not None
    found_BTC = found.payload.tensors()[0]
    target_BTC = bring(target.payload.tensors()[0], found_BTC.device)
    places_N = found.places(found_BTC.device)
    found_NC, target_NC = rows_at(found_BTC, places_N), rows_at(target_BTC, places_N)
    gap_NC = found_NC.double() - target_NC
    return gap_NC.numel(), gap_NC.square_().sum()


def read_errors(errors: Mapping[int, tuple[int, Tensor]]) -> dict[int, tuple[int, float]]:
    """Convert results of `squared_error` to Python numbers with a single device read."""
    if not errors:
        return {}
    sums = torch.stack([total for _, total in errors.values()]).tolist()
    counts = [count for count, _ in errors.values()]
    return dict(zip(errors, zip(counts, sums, strict=True), strict=True))


def restore(compressed: Shard, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a shard's blocks, by their names in the model."""
    for name, tensor in tensors.items():
        path, _, child = name.rpartition(".")
        target = getattr(compressed.module(path), child)
        with torch.no_grad():
            target.copy_(tensor)
