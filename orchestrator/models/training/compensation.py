"""A compressed block made to follow the dense one's outputs on the inputs that it really gets.

Shape suffixes: B sequences, T tokens, O outputs, I inputs, R rank.
"""

from collections.abc import Mapping, Sequence
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
from orchestrator.models.forms.modules import (
    LowRankLinear,
    LowRankSparseLinear,
    PivotedLinear,
    SharedBasis,
)
from orchestrator.models.shards.chunk import Chunk, rows_at
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import dense_weight
from orchestrator.models.training.compensation_options import CompensationOptions
from orchestrator.plan.linear import Linear


def compensate_block(
    dense: Shard,
    compressed: Shard,
    dense_inputs: Sequence[Chunk],
    inputs: Sequence[Chunk],
    linears: Sequence[Linear],
    options: CompensationOptions,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Fits the factors of a block's linears again, in place; see `linalg.compensate`.

    Site by site in the order in which the block calls them, because a site's inputs depend on the
    linears before: q, k, v, then o, then gate and up, then down. For each site the chunks pass once
    through both blocks, up to the site and no further. Statistics are of the tokens in the mask.

    Held beside the two blocks: the moments of one site, at most 56 bytes a squared channel; 46 GB
    for the widest of a block of 70B.

    Args:
        dense_inputs: Chunks at the dense block's input.
        inputs: The same chunks at the compressed one's.
        linears: The block's linears in the order of their calls; those without factors are left.

    Returns:
        The tensors that have changed, by their names in the model, as they stand in the shard; and
        for each linear that has factors what was measured.
    """
    changed: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    modules = {each.name: _factored(compressed.module(each.name)) for each in linears}
    fitted = [each for each in linears if modules[each.name] is not None]
    for site in dict.fromkeys(each.site for each in fitted):
        together = [each for each in fitted if each.site == site]
        drift = gather_drift(dense, compressed, together[0], dense_inputs, inputs, options)
        turn = input_map(drift, options.dense_part, options.damping)
        for linear in together:
            module = modules[linear.name]
            assert module is not None
            result = compensate(
                dense_weight(dense.module(linear.name)),
                _factors(module),
                drift,
                turn,
                beta=options.dense_part,
                basis=cast(Basis, options.basis),
            )
            facts[linear.name] = result.report
            if result.taken:
                put = _put(module, result.factors, is_new=options.basis == "new")
                changed |= {f"{linear.name}.{name}": tensor for name, tensor in put.items()}
    return changed, facts


def _factored(module: nn.Module) -> LowRankLinear | None:
    """The module, if it is two factors of its own."""
    is_own = isinstance(module, LowRankLinear) and not isinstance(module.down, SharedBasis)
    return cast(LowRankLinear, module) if is_own else None


def _factors(module: LowRankLinear) -> Factors:
    """A module's left factor on all outputs, its right one, and its entries."""
    left_OR, rest_OI = module.weight.detach(), None
    if isinstance(module, PivotedLinear):
        eye_RR = torch.eye(module.rank, dtype=left_OR.dtype, device=left_OR.device)
        left_OR = torch.cat([eye_RR, left_OR]).index_select(0, module.index)
    if isinstance(module, LowRankSparseLinear):
        rest_OI = module.sparse.dense_weight().detach()
    return Factors(left_OR=left_OR, down_RI=module.down.weight.detach(), rest_OI=rest_OI)


@torch.no_grad()
def _put(module: LowRankLinear, factors: Factors, *, is_new: bool) -> dict[str, Tensor]:
    """Puts factors into a module; what of it is another now, by its name there.

    Pivots and combinations stay with the left factor; those of a new one are found again.
    """
    module.down.weight.copy_(factors.down_RI)
    changed: dict[str, Tensor] = {"down.weight": module.down.weight}
    if not is_new:
        return changed
    left_OR = factors.left_OR
    if isinstance(module, PivotedLinear):
        pivoted = pivot(left_OR, factors.down_RI)
        left_OR = pivoted.weight_SR
        module.down.weight.copy_(pivoted.down_RI)
        module.index.copy_(pivoted.order_O)
        changed["index"] = module.index
    module.weight.copy_(left_OR)
    return changed | {"weight": module.weight}


def gather_drift(
    dense: Shard,
    compressed: Shard,
    linear: Linear,
    dense_inputs: Sequence[Chunk],
    inputs: Sequence[Chunk],
    options: CompensationOptions,
) -> Drift:
    """What the two models read at a linear, over all chunks in their order.

    The dense one is not asked where the objective has no part of it.
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
    """Runs a shard up to one of its linears, for what that reads; as a context manager."""

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
        """The rows [T, I] of a chunk's tokens inside the mask."""
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
    """Values of the residual stream inside the mask, and the sum of their squared differences.

    The sum is a float64 tensor [] on the device of `found`, and not read: `read_errors` brings
    those of many chunks to the host at once. Takes 16 bytes a value meanwhile.
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
    """Results of `squared_error` as Python numbers, by one read of the device for all."""
    if not errors:
        return {}
    sums = torch.stack([total for _, total in errors.values()]).tolist()
    counts = [count for count, _ in errors.values()]
    return dict(zip(errors, zip(counts, sums, strict=True), strict=True))


def restore(compressed: Shard, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors into a shard's blocks, by their names in the model."""
    for name, tensor in tensors.items():
        path, _, child = name.rpartition(".")
        place = getattr(compressed.module(path), child)
        with torch.no_grad():
            place.copy_(tensor)
