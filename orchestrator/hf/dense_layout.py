"""Layout on disk of a dense mixture of experts, to which the linears of experts are put together.

Families store experts one by one under names of their own, or as one tensor for all experts of a
block; rules of transformers, which saving reverses, say how.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from orchestrator.models.checkpoint.headers import SINGLE_FILE
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec
from orchestrator.models.survey.expert_weights import ExpertSource, find_sources
from orchestrator.models.survey.names import in_loading_order
from orchestrator.store.places import Place

EXPERTS = "experts"
"""Part of a tensor that several linears of experts are put together to."""


@dataclass(slots=True)
class _Shapes:
    """Names, shapes and dtypes of the tensors that a dense model is saved as."""

    directory: Place
    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


class DenseLayout:
    """Names and shapes by which transformers saves a dense model, for those of its modules.

    Args:
        native: The model as its class builds it, on the meta device.
        directory: Directory of the checkpoint, for errors.

    Raises:
        InputError: The family stores experts in a layout that is not supported.
    """

    def __init__(self, native: PreTrainedModel, directory: Place) -> None:
        own = native.state_dict()
        shapes = _Shapes(directory, revert_weight_conversion(native, own))
        self._sources: dict[str, ExpertSource] = dict(find_sources(shapes, native))
        """Place of the weight or bias of each linear of an expert, by its name."""
        self._parts: dict[str, dict[int, list[str]]] = {}
        """Names of these by the tensor on disk and the expert."""
        for name, source in self._sources.items():
            experts = self._parts.setdefault(source.stored, {})
            experts.setdefault(int(name.rsplit(".", 3)[1]), []).append(name)
        self._shapes = shapes
        rules = get_model_conversion_mapping(native)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._names: dict[str, str] = {}
        """Name on disk of every other tensor."""
        for disk_name in in_loading_order(shapes):
            prefix = native.base_model_prefix
            name, _ = rename_source_key(disk_name, renamings, converters, prefix, own)
            self._names[name] = disk_name

    def arranged(self, files: Sequence[FileSpec]) -> tuple[FileSpec, ...]:
        """Return files with the names on disk; a tensor of all experts stands in the first's."""
        done: set[str] = set()
        arranged = []
        for file in files:
            specs = []
            for spec in file.tensors:
                source = self._sources.get(spec.name)
                if source is None:
                    specs.append(replace(spec, name=self._names.get(spec.name, spec.name)))
                elif source.stored not in done:
                    done.add(source.stored)
                    specs.append(
                        TensorSpec(
                            name=source.stored,
                            dtype=spec.dtype,
                            shape=self._shapes.shape(source.stored),
                            part=EXPERTS,
                            source=source.stored,
                        )
                    )
            if specs:
                arranged.append(FileSpec(name=file.name, tensors=tuple(specs)))
        if len(arranged) == 1:
            return (replace(arranged[0], name=SINGLE_FILE),)
        return tuple(arranged)

    def entries(self, spec: TensorSpec, read: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """Yield the entries of a tensor with part `experts`, expert by expert, in its dtype.

        Memory: one entry, and what `read` returns.

        Args:
            read: Returns weight or bias of a linear by its name, in any dtype.
        """
        for _, names in sorted(self._parts[spec.name].items()):
            is_fused = self._sources[names[0]].piece is not None
            entry = torch.empty(spec.shape[1:] if is_fused else spec.shape, dtype=spec.torch_dtype)
            for name in names:
                self._sources[name].place(entry).copy_(read(name))
            yield entry
