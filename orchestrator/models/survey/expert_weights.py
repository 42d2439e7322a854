"""View of a checkpoint with one tensor for each matrix of an expert, whatever the stored layout.

Checkpoints store experts as a tensor for every matrix, under names of the family, or as one tensor
for all experts of a block. The view has the names of the modules that `replace_experts` makes,
`model.layers.3.mlp.experts.17.down.weight`, so that names, loading and copies need no other rule.
It is made from headers and the model as its class builds it; no weight is read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from orchestrator.device.transport import CPU
from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import Checkpoint, NamedShapes, Weights
from orchestrator.models.experts.layout import ExpertsLayout, Kind, Part
from orchestrator.models.experts.replace import find_experts
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.names import in_loading_order
from orchestrator.store.places import Place

ONE_BY_ONE = (["MergeModulelist", "Concatenate"], ["MergeModulelist"])
"""Conversions of a checkpoint that stores every matrix of an expert for itself."""
TURNED = ["Transpose"]
"""Conversion of a fused tensor whose matrices are stored in the other order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSource:
    """Origin of a virtual tensor: a stored tensor, or one of the pieces that it consists of."""

    stored: str
    layout: ExpertsLayout
    part: Part
    kind: Kind
    piece: tuple[int, ...] | None = None
    """Shape of the pieces of a fused tensor; None: the stored tensor is the matrix."""
    index: int = 0
    """Number of the piece."""
    is_matrix: bool = True
    """True if a piece is one matrix; False if it is the expert's entry of the fused tensor."""
    is_turned: bool = False
    """True if the entry is transposed to that of the module."""

    def at(self, expert: int, entry: tuple[int, ...]) -> "ExpertSource":
        """Return the origin of an expert's matrix or bias in a fused tensor with these entries."""
        layout = self.layout
        has_outputs_first = self.kind == "bias" or layout.is_transposed == self.is_turned
        is_half = layout.has_gate and layout.is_concatenated and self.part != "down"
        if is_half and has_outputs_first:
            half = (layout.features(self.part)[1], *entry[1:])
            return replace(self, piece=half, index=2 * expert + (self.part == "up"))
        return replace(self, piece=entry, index=expert, is_matrix=False)

    def place(self, entry: Tensor) -> Tensor:
        """Return the view of a matrix or bias in an expert's entry of the stored tensor.

        Args:
            entry: Entry of a fused tensor; the stored tensor itself if it is one matrix.
        """
        if self.piece is None:
            return entry
        if self.is_matrix:
            halves = entry.view(-1, *self.piece)
            return halves[self.index % len(halves)]
        return self.layout.take(self.part, self.kind, entry.T if self.is_turned else entry)

    def take(self, piece: Tensor) -> Tensor:
        """Return weight or bias from the piece; a view if possible."""
        if not self.is_matrix:
            entry = piece.T if self.is_turned else piece
            piece = self.layout.take(self.part, self.kind, entry)
        return self.layout.without_gaps(self.kind, piece)


class ExpertWeights:
    """Checkpoint with a virtual tensor for each matrix of an expert; the stored ones are hidden.

    Reading a virtual tensor reads its own byte range, or, where gate and up alternate or are
    stored as [inputs, outputs], that of both.

    Args:
        stored: The checkpoint.
        native: The model as its class builds it, on the meta device.

    Raises:
        InputError: Experts are stored in a layout that needs another conversion, or in other
            shapes than the model's.
    """

    def __init__(self, stored: Weights, native: PreTrainedModel) -> None:
        self.directory: Place = stored.directory
        self._stored = stored
        self._sources: dict[str, ExpertSource] = {}
        for name, source in find_sources(stored, native):
            if name in self._sources:
                raise InputError(
                    f"{self.directory}: {self._sources[name].stored} and {source.stored} both map "
                    f"to {name}"
                )
            self._sources[name] = source
        hidden = {source.stored for source in self._sources.values()}
        self._names = (*(name for name in stored.names if name not in hidden), *self._sources)

    @property
    def fingerprint(self) -> str:
        return self._stored.fingerprint

    @property
    def size_bytes(self) -> int:
        return self._stored.size_bytes

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._sources.get(name)
        if source is None or source.piece is None:
            return self._stored.shape(name if source is None else source.stored)
        return tuple(source.take(torch.empty(source.piece, device="meta")).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._stored_name(name))

    def origin(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Return name and shape of the tensor on disk that an expert's is, or is a part of.

        None: the tensor is no expert's.
        """
        source = self._sources.get(name)
        return None if source is None else (source.stored, self._stored.shape(source.stored))

    def are_equal(self, one: str, other: str) -> bool:
        """Compare two tensors that are not of experts; see `Headers`."""
        return self._stored.are_equal(one, other)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to prefetch tensors, fused ones as a whole; see `Weights`."""
        self._stored.read_ahead({self._stored_name(name) for name in names})

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """Read a tensor to a device, in its dtype on disk, into private memory; see `Weights`.

        A matrix stored as [inputs, outputs] is returned as a transposed view of adjoining values.
        """
        source = self._sources.get(name)
        if source is None or source.piece is None:
            return self._stored.read(self._stored_name(name), device)
        piece = self._stored.read_piece(source.stored, source.index, source.piece, device)
        return source.take(piece)

    def _stored_name(self, name: str) -> str:
        source = self._sources.get(name)
        return name if source is None else source.stored


def view_experts(weights: Weights, architecture: Architecture) -> Checkpoint:
    """View a checkpoint with one tensor for each matrix of an expert, if it has experts.

    Cost for a model with experts: one build of its class on the meta device. A model without any
    is known by its config.

    Raises:
        InputError: As `ExpertWeights` and `Architecture.build`.
    """
    if not _mentions_experts(architecture.config.to_dict()):
        return weights
    native = architecture.build_native(torch.float32, stored=len(weights.names))
    return ExpertWeights(weights, native)


def _mentions_experts(config: Any) -> bool:
    """Test if a key of a config has the word expert, as the number of experts always has."""
    if isinstance(config, Mapping):
        return any("expert" in str(key) or _mentions_experts(config[key]) for key in config)
    return isinstance(config, list) and any(_mentions_experts(each) for each in config)


def find_sources(
    stored: NamedShapes, native: PreTrainedModel
) -> Iterator[tuple[str, ExpertSource]]:
    """Yield the name and the origin of every virtual tensor; arguments are those of the view.

    Raises:
        InputError: As `ExpertWeights`.
    """
    layouts = find_experts(native)
    tensors = native.state_dict()
    rules = get_model_conversion_mapping(native)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for disk_name in in_loading_order(stored):
        name, pattern = rename_source_key(
            disk_name, renamings, converters, native.base_model_prefix, tensors
        )
        module, _, fused = name.rpartition(".")
        layout = layouts.get(module)
        # a tensor of whole numbers under such a name does not store weights
        if layout is None or name not in tensors or not stored.dtype(disk_name).is_floating_point:
            continue
        kind: Kind = "bias" if fused.endswith("_bias") else "weight"
        parts = [part for part in layout.parts if layout.fused_name(part, kind) == fused]
        rule = None if pattern is None else by_pattern[pattern]
        operations = [] if rule is None else [type(each).__name__ for each in rule.operations]
        if (
            rule is not None
            and operations in ONE_BY_ONE
            and len(rule.source_patterns) == len(parts)
        ):
            part = parts[rule.source_patterns.index(pattern)]
            number = [each for each in disk_name.split(".") if each.isdigit()][-1]
            source = ExpertSource(stored=disk_name, layout=layout, part=part, kind=kind)
            yield f"{module}.{int(number)}.{part}.{kind}", source
        elif operations in ([], TURNED):
            shape, needed = stored.shape(disk_name), tuple(tensors[name].shape)
            turn = rule.operations[0] if rule is not None else None
            is_turned = turn is not None and (not turn.check_dims or shape != needed)
            if shape != ((*needed[:1], *needed[:0:-1]) if is_turned else needed):
                raise InputError(
                    f"{stored.directory}: {disk_name} has shape {list(shape)}, {name} of "
                    f"{type(native).__name__} has {list(needed)}"
                )
            for part in parts:
                source = ExpertSource(
                    stored=disk_name, layout=layout, part=part, kind=kind, is_turned=is_turned
                )
                for expert in range(layout.num_experts):
                    yield f"{module}.{expert}.{part}.{kind}", source.at(expert, shape[1:])
        else:
            raise InputError(
                f"{stored.directory}: {disk_name} is stored in another layout than {name} of "
                f"{type(native).__name__} ({', '.join(operations)}); save the model again with "
                "transformers' save_pretrained"
            )
