"""Mapping between stored tensors and the model's tensors.

Names on disk are not always module names (GPT-2 without prefix, old layouts). The mapping follows
transformers' own renaming rules and needs only the headers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import Checkpoint, NamedShapes
from orchestrator.models.experts.module import Experts
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.forms.guards import conversions_of


@dataclass(frozen=True, slots=True)
class Names:
    """Mapping between the model's tensors and the stored ones."""

    disk: Mapping[str, str]
    """Name on disk of every stored tensor, by its name in the model, in model order."""
    tied: Mapping[str, str]
    """Stored parameter that each parameter without a stored tensor is tied to."""
    unused: tuple[str, ...]
    """Names on disk that match no tensor of the model."""
    doubled: Mapping[str, str]
    """Parameters that the class ties to another one, the value, but that are stored beside it."""


def map_names(model: PreTrainedModel, weights: Checkpoint) -> Names:
    """Map the tensors of a model on the meta device; no weight is read.

    A persistent buffer that is not stored keeps its initial value, as in `from_pretrained`. The
    index of a sparse weight and the guard of experts have no initial value and must be stored, like
    a parameter.

    Raises:
        InputError: A parameter is missing, stored twice, has another shape, or is stored in a
            layout that needs a computation to convert.
    """
    tensors = model.state_dict()
    disk: dict[str, str] = {}
    unused = []
    conversions = conversions_of(model)
    for disk_name in in_loading_order(weights):
        name = _module_name(model, disk_name, tensors, conversions=conversions, weights=weights)
        if name not in tensors:
            unused.append(disk_name)
            continue
        if name in disk:
            raise InputError(
                f"{weights.directory}: {disk[name]} and {disk_name} both map to {name}"
            )
        if weights.shape(disk_name) != tuple(tensors[name].shape):
            raise InputError(
                f"{weights.directory}: {disk_name} has shape {list(weights.shape(disk_name))}, "
                f"{name} of {type(model).__name__} has {list(tensors[name].shape)}"
            )
        stored, needed = weights.dtype(disk_name), tensors[name].dtype
        if needed.is_floating_point != stored.is_floating_point:
            raise InputError(
                f"{weights.directory}: {disk_name} is stored as {stored}, {name} is {needed}; "
                "a checkpoint that is not quantised is needed"
            )
        disk[name] = disk_name
    tied = _find_tied(model, disk)
    needed = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name, module in model.named_modules():
        if isinstance(module, FormLinear | Experts):
            needed += [f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)]
    missing = [name for name in needed if name not in disk and name not in tied]
    if missing:
        raise InputError(
            f"{weights.directory}: {len(missing)} of {len(needed)} parameters of "
            f"{type(model).__name__} are not stored: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    ordered = {name: disk[name] for name in tensors if name in disk}
    pairs = model.all_tied_weights_keys.items()
    doubled = {target: source for target, source in pairs if target in disk and source in disk}
    return Names(ordered, tied, tuple(unused), doubled)


def in_loading_order(weights: NamedShapes) -> list[str]:
    """Sort the names on disk as the loader does: some rules keep state about the names seen so far.

    Raises:
        InputError: A name has a digit that is no decimal number.
    """
    try:
        return sorted(weights.names, key=dot_natural_key)
    except ValueError as error:  # the loader's order reads `²` as a number
        raise InputError(f"{weights.directory}: invalid tensor name: {error}") from error


def _module_name(
    model: PreTrainedModel,
    disk_name: str,
    tensors: Mapping[str, Tensor],
    *,
    conversions: list[WeightRenaming | WeightConverter],
    weights: Checkpoint,
) -> str:
    """Name in the model of a tensor on disk, by transformers' renaming rules.

    Raises:
        InputError: The stored layout has to be converted by a computation.
    """
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    name, pattern = rename_source_key(disk_name, renamings, converters, prefix, tensors)
    if name not in tensors and disk_name in tensors:
        name, pattern = rename_source_key(disk_name, [], [], prefix, tensors)
    if pattern is not None and name in tensors:
        raise InputError(
            f"{weights.directory}: {disk_name} is stored in another layout than {name} of "
            f"{type(model).__name__}; save the model again with transformers' save_pretrained"
        )
    return str(name)


def _find_tied(model: PreTrainedModel, disk: Mapping[str, str]) -> dict[str, str]:
    """Map parameters without a stored tensor to the stored member of their tied group."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    tied = {}
    for group in groups.values():
        stored = next((name for name in group if name in disk), None)
        if stored is not None:
            tied.update({name: stored for name in group if name not in disk})
    return tied
