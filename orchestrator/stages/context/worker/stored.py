"""Stored tensors of a run: the sources that the tensors of a checkpoint are read from, in order.

Shape suffixes: N entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from orchestrator.device.transport import download, upload
from orchestrator.methods.kinds.base import Factor, Kind, StoredLinear
from orchestrator.methods.kinds.ranked import MaskedParts
from orchestrator.models.checkpoint.layout import MEAN, FileSpec, TensorSpec
from orchestrator.models.checkpoint.weights import Checkpoint, Weights
from orchestrator.models.checkpoint.write import write_file
from orchestrator.models.forms.config import ROUTER
from orchestrator.models.forms.index_codes import encode
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.expert_weights import view_experts
from orchestrator.plan.grouping import is_wide
from orchestrator.plan.linear import Linear
from orchestrator.stages.context.masks import read_candidates
from orchestrator.stages.context.task import CompressionTask
from orchestrator.stages.context.worker.orders import ADAPTERS_FILE, read_gains, read_scores
from orchestrator.store.places import Place
from orchestrator.store.run import RunDirectory

CODED = ("values", "index", "rows")
"""Parts of a linear that its entries give."""


class TensorSource(Protocol):
    """One place where stages leave tensors of the compressed model."""

    def read(self, tensor: TensorSpec) -> Tensor | None:
        """Return the tensor, on any device, or None if it is not stored here."""
        ...


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The tensors of a compressed model, each from the first of the sources that has it.

    Later stages come first: trained tensors, refitted factors, pivoted factors, kept candidates,
    decompositions.
    """

    sources: tuple[TensorSource, ...]
    kept: "KeptCandidates | None" = None
    """The source among them whose errors are measured as a file is written."""

    def read(self, tensor: TensorSpec) -> Tensor:
        """Return one tensor of the checkpoint.

        Raises:
            ValueError: No source has it.
        """
        for source in self.sources:
            if (found := source.read(tensor)) is not None:
                return found
        raise ValueError(
            f"{tensor.name}: no stage stores part {tensor.part!r} of {tensor.source}; the plan and "
            "the stages of the run do not fit together"
        )

    def write(self, file: Mapping[str, Any], out: Place) -> dict[str, Any]:
        """Write one file of the checkpoint; returns its facts, with the errors of kept candidates.

        Args:
            file: A `FileSpec` as JSON.
        """
        spec = FileSpec.from_json(file)
        facts = write_file(spec, out / spec.name, self.read)
        return facts if self.kept is None else facts | {"errors": self.kept.errors(spec)}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The tensors that a unit stores of a linear, read to a device."""

    path: Path
    device: torch.device

    def whole(self, name: str) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return upload(file.get_tensor(name), self.device)

    def prefix(self, name: str, rows: int, columns: range | None = None) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            stored = file.get_slice(name)
            if columns is None:
                return upload(stored[:rows], self.device)
            return upload(stored[:rows, columns.start : columns.stop], self.device)


@dataclass(frozen=True, slots=True)
class OrderedFile(StoredFile):
    """Stored tensors of which directions, the rows, are kept in another order."""

    order_K: Tensor
    """Indices of the rows, best first."""
    gains_K: Tensor | None = None
    """Factors of the rows of `weight` in this order, float32; None: they stay as they are."""

    def prefix(self, name: str, rows: int, columns: range | None = None) -> Tensor:
        """Return the rows that are kept first; the tensor is read as a whole."""
        stored = self.whole(name)[self.order_K[:rows].to(self.device)]
        if self.gains_K is not None and name == "weight":
            gained = stored * self.gains_K[:rows, None].to(self.device)
            stored = gained.to(stored.dtype)
        if columns is None:
            return stored
        return stored[:, columns.start : columns.stop].contiguous()


@dataclass(frozen=True, slots=True)
class AdaptedFile:
    """Stored tensors of directions, behind those of an adapter of the same linear."""

    directions: StoredFile
    adapters: StoredFile
    linear: str
    rank: int
    """Rank of the adapter."""

    def whole(self, name: str) -> Tensor:
        return self.directions.whole(name)

    def prefix(self, name: str, rows: int, columns: range | None = None) -> Tensor:
        """Return the rows of the adapter, and behind them the first ones of the directions."""
        stored = self.directions.prefix(name, max(rows - self.rank, 0), columns)
        own = self.adapters.prefix(f"{self.linear}.{name}", min(rows, self.rank), columns)
        return torch.cat([own.to(stored), stored])


class DenseTensors:
    """Tensors that the compressed model has in common with the dense one."""

    def __init__(self, model: Place) -> None:
        self._model = model

    @cached_property
    def _weights(self) -> Checkpoint:
        return view_experts(Weights.open(self._model), Architecture.read(self._model))

    def read(self, tensor: TensorSpec) -> Tensor | None:
        if tensor.part not in ("copy", ROUTER):
            return None
        found = self._weights.read(tensor.source)
        return found[list(tensor.experts)] if tensor.part == ROUTER else found

    def weight(self, linear: str) -> Tensor:
        """Return the dense weight of a linear, in its own layout."""
        return self._weights.read(f"{linear}.weight")


class MergedWeights:
    """Means of dense weights by the calibration tokens of each; equal ones if there are none."""

    def __init__(self, dense: DenseTensors, decompositions: "Decompositions") -> None:
        self._dense, self._decompositions = dense, decompositions

    def read(self, tensor: TensorSpec) -> Tensor | None:
        """Return the mean, float64: that of equal weights is exact. Memory: two weights."""
        if tensor.part != MEAN:
            return None
        tokens = [int(self._decompositions.whole(name, "tokens")) for name in tensor.members]
        counts = tokens if any(tokens) else [1] * len(tokens)
        total_OI = torch.zeros(tensor.shape, dtype=torch.float64)
        for name, count in zip(tensor.members, counts, strict=True):
            total_OI.add_(self._dense.weight(name).double(), alpha=count)
        return total_OI / sum(counts)


class Decompositions:
    """The decompositions of the linears, cut to the sizes that tensors have in the plan."""

    def __init__(self, task: CompressionTask, run: RunDirectory, device: torch.device) -> None:
        self._task, self.run, self._device = task, run, device
        self._kind = task.method.kind
        self._groups = {
            linear.name: group for group in task.grouping.groups(task.linears) for linear in group
        }
        self._last: tuple[tuple[str, int], tuple[Tensor, Tensor]] | None = None
        self._scores = cache(partial(read_scores, run))
        self._gains = cache(partial(read_gains, run))

    def read(self, tensor: TensorSpec) -> Tensor | None:
        linear = self._task.linear(tensor.source)
        if tensor.part in ("weight", "down"):
            part = cast(Factor, tensor.part)
            return self.factor(linear, part, tensor.rank, tensor.nonzeros)
        if tensor.part in CODED:
            return coded(tensor, linear, self._entries(linear, tensor))
        sizes = {"rank": tensor.rank, "nonzeros": tensor.nonzeros}
        return self._kind.part(self.stored(linear), tensor.part, **sizes)

    def factor(self, linear: Linear, part: Factor, rank: int, nonzeros: int = 0) -> Tensor:
        """Return a factor of a linear, cut to a rank, on the device."""
        group, channels = self._groups[linear.name], None
        if len(group) > 1 and (part == "down") == is_wide(group):
            size = linear.in_features if part == "down" else linear.out_features
            start = group.index(linear) * size
            channels = range(start, start + size)
        stored = self.stored(linear)
        return self._kind.factor(stored, part, channels, rank=rank, nonzeros=nonzeros)

    def bias(self, linear: Linear, rank: int) -> Tensor | None:
        """Return the bias of factors of a rank, on the device; None: the form has none."""
        if not self._task.form.has_bias:
            return None
        return self._kind.part(self.stored(linear), "bias", rank=rank, nonzeros=0)

    def _entries(self, linear: Linear, tensor: TensorSpec) -> tuple[Tensor, Tensor]:
        """Return values and positions; the last ones are kept, since a linear's parts adjoin."""
        wanted = linear.name, tensor.nonzeros
        if self._last is None or self._last[0] != wanted:
            self._last = None
            sizes = {"rank": tensor.rank, "nonzeros": tensor.nonzeros}
            values_N, positions_N = self._kind.entries(self.stored(linear), **sizes)
            # on the host: the last ones would stay on the device as long as the worker
            self._last = wanted, (values_N.cpu(), positions_N.cpu())
        return self._last[1]

    def whole(self, linear: str, name: str) -> Tensor:
        """Return a stored tensor of a linear."""
        return self.stored(self._task.linear(linear)).whole(name)

    def stored(self, linear: Linear) -> StoredLinear:
        """Return the file of a linear, or of those that share its basis."""
        first = self._groups[linear.name][0]
        key = self._task.block_keys[self._task.grouping.first(first.block)]
        path = self.run.units.file(key, factors_file(first))
        if linear.block in self._task.order_keys:
            order_key = self._task.order_keys[linear.block]
            scores = self._scores(order_key)
            if linear.name in scores:
                order_K = torch.from_numpy(scores[linear.name].order_K).long()
                gains_K = self._plan_gains(linear, order_K)
                ordered = OrderedFile(path, self._device, order_K, gains_K)
                if not (rank := scores[linear.name].adapters):
                    return ordered
                adapters = StoredFile(self.run.units.file(order_key, ADAPTERS_FILE), self._device)
                return AdaptedFile(ordered, adapters, linear.name, rank)
        return StoredFile(path, self._device)

    def gains(self, linear: Linear) -> Tensor | None:
        """Return the gates of a linear's directions that its scores are from, in their order,
        float32 [K]; None if gates were not polarised."""
        gains_K = self._scores(self._task.order_keys[linear.block])[linear.name].gains_K
        return None if gains_K is None else torch.from_numpy(gains_K)

    def _plan_gains(self, linear: Linear, order_K: Tensor) -> Tensor | None:
        """Return the gains of the plan, in order, 1 behind the directions that have some."""
        key = self._task.gain_keys.get(linear.block)
        found_K = None if key is None else self._gains(key).get(linear.name)
        if found_K is None:
            return None
        gains_K = torch.from_numpy(found_K)
        return pad(gains_K, (0, len(order_K) - len(gains_K)), value=1.0)


class KeptCandidates:
    """Directions and entries that a choice keeps of the decompositions.

    Args:
        key: The unit of the choice; see `masks.commit_candidates`.
    """

    def __init__(self, key: str, decompositions: Decompositions, task: CompressionTask) -> None:
        self._key, self._decompositions, self._task = key, decompositions, task
        self._last: tuple[str, MaskedParts] | None = None

    def read(self, tensor: TensorSpec) -> Tensor | None:
        linear = self._task.linear(tensor.source)
        kept = self._parts(linear)
        if tensor.part == "weight":
            return kept.weight_RO.T
        if tensor.part == "down":
            return kept.down_RI
        return coded(tensor, linear, kept.entries())

    def errors(self, file: FileSpec) -> dict[str, dict[str, float]]:
        """Measure the errors of the choice, by linear with entries in a file."""
        names = {tensor.source for tensor in file.tensors if tensor.part == "values"}
        return {
            linear.name: self._parts(linear).errors(self._decompositions.stored(linear))
            for linear in self._task.linears
            if linear.name in names
        }

    def _parts(self, linear: Linear) -> MaskedParts:
        """Return the kept parts; the last ones are kept in memory, since a linear's adjoin."""
        if self._last is None or self._last[0] != linear.name:
            values = read_candidates(self._decompositions.run, self._key, linear)
            if values is None:
                raise ValueError(f"{linear.name} is dense in the choice and cut in the plan")
            stored = self._decompositions.stored(linear)
            self._last = linear.name, MaskedParts.read(stored, values.chosen())
        return self._last[1]


def coded(tensor: TensorSpec, linear: Linear, entries: tuple[Tensor, Tensor]) -> Tensor:
    """Return the values or the coded positions of entries that come by ascending position."""
    values_N, positions_N = entries
    if tensor.part == "values":
        return values_N
    sizes = linear.out_features, linear.in_features
    return encode(tensor.code, positions_N, *sizes)[tensor.part]


def host_tensors(kind: Kind[Any], result: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that a unit stores of a result, in the host's memory."""
    # transposed on the device of the result: milliseconds on a GPU
    stored = kind.tensors(result, dtype).items()
    return {name: download(rows.contiguous()) for name, rows in stored}


def factors_file(linear: Linear) -> str:
    """Return the name of the file with a linear's decomposition, in the unit of its block."""
    return f"{linear.name}.safetensors"
