"""Installation of the forms that a config names in a model of transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.router import reduce_router
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import FormLinear, StoredForm
from orchestrator.models.forms.config import EXPERTS, REDUCED, ROUTER, misfits, read_forms
from orchestrator.models.forms.guards import (
    check_dropped,
    check_names,
    install_experts,
    without_prefix,
)


def install_forms(model: PreTrainedModel, quantization_config: Mapping[str, Any]) -> None:
    """Replace in place every module that the config names by its form, with empty parameters.

    Device and dtype are those of the weight that goes; on the meta device no memory is allocated.
    A model without the head, whose modules lack the `model.` in front, takes the same config.
    If experts are compressed, all experts are replaced by `Experts` first; routers may lose the
    rows of those that are dropped. A shared basis is registered as tied, which loading and saving
    act on; it is not yet tied.

    Raises:
        InputError: The config is invalid, names no linear of this model, or gives a form that
            does not fit the linear or stores no fewer values; or experts are not supported.
    """
    forms = read_forms(quantization_config)
    experts = {}
    if EXPERTS in quantization_config:
        experts = install_experts(model, quantization_config[EXPERTS])
    linears = _find_linears(model, forms)
    sizes = {given: features(module)[::-1] for given, (_, module) in linears.items()}
    for given, reason in misfits(forms, sizes):
        raise InputError(
            f"config.json: quantization_config.modules[{given!r}]: {reason}; "
            "the config does not belong to this model"
        )
    shared = {form.basis for form in forms.values()}
    for given, form in forms.items():
        name, module = linears[given]
        replacement = _make(form, module, shares_basis=bool(form.basis) or given in shared)
        if form.basis:
            tensor = replacement.basis_tensor
            basis = f"{linears[form.basis][0]}.{tensor}"
            # the model's map is read when weights are loaded, the module's when they are saved
            model.all_tied_weights_keys[f"{name}.{tensor}"] = basis
            replacement._tied_weights_keys = {tensor: basis}  # type: ignore[assignment]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
    check_dropped(experts)
    if quantization_config.get(ROUTER) == REDUCED:
        for name in [name for name, each in model.named_modules() if isinstance(each, Experts)]:
            reduce_router(model, name)
    stored = (f"{name}.{key}" for name, each in experts.items() for key in each.state_dict())
    check_names(model, stored)


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of an `nn.Linear`, or of a `Conv1D`, whose weight is [inputs, outputs]."""
    size = module.weight.shape
    assert isinstance(size, torch.Size)
    return (size[0], size[1]) if isinstance(module, Conv1D) else (size[1], size[0])


def _find_linears(
    model: PreTrainedModel, forms: Mapping[str, StoredForm]
) -> dict[str, tuple[str, nn.Linear | Conv1D]]:
    """Name in the model and module of every linear, by its name in the config."""
    modules = {
        without_prefix(model, name): (name, module) for name, module in model.named_modules()
    }
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    linears = {}
    for given in forms:
        where = f"config.json: quantization_config.modules[{given!r}]"
        name, module = modules.get(without_prefix(model, given), ("", None))
        if not isinstance(module, nn.Linear | Conv1D):
            found = "no such module" if module is None else f"a {type(module).__name__}"
            raise InputError(f"{where}: found {found} in {type(model).__name__}, need a linear")
        if f"{name}.weight" in tied:
            raise InputError(f"{where}: its weight is tied to another, so it must stay dense")
        linears[given] = name, module
    return linears


def _make(form: StoredForm, module: nn.Linear | Conv1D, *, shares_basis: bool) -> FormLinear:
    """The module of this form, of the linear's size, with empty parameters."""
    in_features, out_features = features(module)
    return FORMS[form.form].make(
        form,
        in_features,
        out_features,
        shares_basis=shares_basis,
        bias=module.bias is not None,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
