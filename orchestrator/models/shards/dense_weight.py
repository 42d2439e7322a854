"""Reconstruction of dense weights from compressed linears.

Shape suffixes: O outputs, I inputs.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.survey.names import Names


def read_dense_weight(
    model: PreTrainedModel, linear: str, weights: Weights, names: Names
) -> Tensor:
    """Compute the dense weight [O, I] of a compressed linear, float32, by the module of its form.

    Raises:
        InputError: The index of a sparse or pivoted weight is invalid.
    """
    module = model.get_submodule(linear)
    assert isinstance(module, FormLinear)
    state = {}
    for key in module.state_dict():
        if key != "bias":
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
    with torch.no_grad():
        weight_OI = module.dense_weight()
    module.to("meta")
    return weight_OI
