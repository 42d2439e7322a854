"""Reconstruction of dense weights from compressed linears.

Shape suffixes: O outputs, I inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import Checkpoint
from orchestrator.models.experts.module import Experts
from orchestrator.models.forms.base import FormLinear, StoredForm
from orchestrator.models.forms.guards import check_guard, guard_entry, guard_values
from orchestrator.models.survey.names import Names


def read_dense_weight(
    model: PreTrainedModel, linear: str, weights: Checkpoint, names: Names
) -> Tensor:
    """Compute the dense weight [O, I] of a compressed linear, float32, by the module of its form.

    Raises:
        InputError: The index of a sparse or pivoted weight is invalid.
    """
    module = _load_module(model, linear, weights, names)
    with torch.no_grad():
        weight_OI = module.dense_weight()
    module.to("meta")
    return weight_OI


def check_index(model: PreTrainedModel, linear: str, weights: Checkpoint, names: Names) -> None:
    """Read the index of a compressed linear, if it has one, without its values.

    Raises:
        InputError: The index is invalid.
    """
    _load_module(model, linear, weights, names, only_index=True).to("meta")


def check_stored_guards(
    model: PreTrainedModel, forms: Mapping[str, StoredForm], weights: Checkpoint, names: Names
) -> None:
    """Compare the stored ranks of experts with the forms of the config.

    Raises:
        InputError: They differ.
    """
    ranks = {name: guard_entry(form) for name, form in forms.items()}
    for name, module in model.named_modules():
        for key in module._buffers if isinstance(module, Experts) else ():
            guard = weights.read(names.disk[f"{name}.{key}"])
            parts, count = module.layout.parts, module.num_experts
            check_guard(name, guard, guard_values(ranks, name, parts, experts=count))


def _load_module(
    model: PreTrainedModel,
    linear: str,
    weights: Checkpoint,
    names: Names,
    *,
    only_index: bool = False,
) -> FormLinear:
    """Load the values of a compressed linear in float32, and its index, which is checked."""
    module = model.get_submodule(linear)
    assert isinstance(module, FormLinear)
    state = {}
    for key, meant in module.state_dict().items():
        if key != "bias" and not (only_index and meant.is_floating_point()):
            name = f"{linear}.{key}"
            tensor = weights.read(names.disk[names.tied.get(name, name)])
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
    module.load_state_dict(state, strict=False, assign=True)
    for part in module.modules():
        if isinstance(part, FormLinear) and not part.is_sound():
            raise InputError(
                f"{weights.directory}: the index of {linear} does not name {part.indexed}; "
                "the checkpoint is damaged"
            )
    return module
