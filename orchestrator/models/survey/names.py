"""Which stored tensor becomes which tensor of the model.

Names on disk are not always module names (prefix-less GPT-2, old layouts); transformers' own
renaming rules give the mapping, from headers alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import Checkpoint
from orchestrator.models.forms.base import FormLinear


@dataclass(frozen=True, slots=True)
class Names:
    """The mapping between the model's tensors and the stored ones."""

    disk: Mapping[str, str]
    """Name on disk of every tensor of the model that is stored, in model order."""
    tied: Mapping[str, str]
    """For every parameter that is not stored itself: the stored one it is tied to."""
    unused: tuple[str, ...]
    """Names on disk that are no tensor of the model."""


def map_names(model: PreTrainedModel, weights: Checkpoint) -> Names:
    """The mapping for a model on the meta device; no weight is read.

    A persistent buffer that is not stored keeps its initial value, as in `from_pretrained`; the
    index of a sparse weight has none, and counts as a parameter.

    Raises:
        InputError: a parameter is not stored, or with another shape, or twice, or in a layout
            that takes a computation to convert.
    """
    tensors = model.state_dict()
    disk: dict[str, str] = {}
    unused = []
    conversions = get_model_conversion_mapping(model)
    try:
        # In the loader's order: some rules remember names they have seen.
        disk_names = sorted(weights.names, key=dot_natural_key)
    except ValueError as error:  # the loader's order takes `²` for a number
        raise InputError(
            f"{weights.directory}: a tensor's name is none of a model's: {error}"
        ) from error
    for disk_name in disk_names:
        name = _module_name(model, disk_name, conversions, tensors, weights)
        if name not in tensors:
            unused.append(disk_name)
            continue
        if name in disk:
            raise InputError(
                f"{weights.directory}: {disk[name]} and {disk_name} both stand for {name}"
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
        if isinstance(module, FormLinear):
            needed += [f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)]
    missing = [name for name in needed if name not in disk and name not in tied]
    if missing:
        raise InputError(
            f"{weights.directory}: {len(missing)} of {len(needed)} parameters of "
            f"{type(model).__name__} are not stored: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    ordered = {name: disk[name] for name in tensors if name in disk}
    return Names(ordered, tied, tuple(unused))


def _module_name(
    model: PreTrainedModel,
    disk_name: str,
    conversions: list[WeightRenaming | WeightConverter],
    tensors: Mapping[str, Tensor],
    weights: Checkpoint,
) -> str:
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    name, pattern = rename_source_key(disk_name, renamings, converters, prefix, tensors)
    if name not in tensors and disk_name in tensors:
        name, pattern = rename_source_key(disk_name, [], [], prefix, tensors)
    if pattern is not None and name in tensors:
        raise InputError(
            f"{weights.directory}: {disk_name} is stored in another layout than {name} of "
            f"{type(model).__name__}; save it again with save_pretrained of transformers"
        )
    return str(name)


def _find_tied(model: PreTrainedModel, disk: Mapping[str, str]) -> dict[str, str]:
    """Parameters without a stored tensor, and the stored member of their tied group."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    tied = {}
    for group in groups.values():
        stored = next((name for name in group if name in disk), None)
        if stored is not None:
            tied.update({name: stored for name in group if name not in disk})
    return tied
