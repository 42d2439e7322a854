"""Forms of the linears of a model in its config, and their installation in a loaded model."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import FormLinear, StoredForm

METHOD = "orchestrator"
FORMAT_VERSION = 1
FIELDS = (
    "quant_method",
    "format_version",
    "producer",
    "base_model",
    "base_fingerprint",
    "modules",
    "modules_to_not_convert",
    "report_blake2b",
)


def read_forms(quantization_config: Mapping[str, Any]) -> dict[str, StoredForm]:
    """Read the form of every module that is not dense, by module name, in the config's order.

    Everything that can be said without the model is checked here; nothing in the config is ever
    taken for code, a class or a path.

    Raises:
        InputError: A field is missing, unknown or of the wrong kind, or the format is a newer one.
    """
    where = "config.json: quantization_config"
    method = quantization_config.get("quant_method")
    if method != METHOD:
        raise InputError(f"{where}.quant_method: found {reprlib.repr(method)}, need {METHOD!r}")
    version = quantization_config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{where}.format_version: found {reprlib.repr(version)}, this program reads "
            f"{FORMAT_VERSION}; load it with the version of orchestrator that wrote it"
        )
    if unknown := [field for field in quantization_config if field not in FIELDS]:
        raise InputError(
            f"{where}: unknown field {reprlib.repr(unknown[0])}; known are {', '.join(FIELDS)}"
        )
    modules = quantization_config.get("modules")
    if not isinstance(modules, Mapping):
        raise InputError(f"{where}.modules: found {reprlib.repr(modules)}, need an object")
    return {name: _read_form(f"{where}.modules[{name!r}]", form) for name, form in modules.items()}


def misfits(
    forms: Mapping[str, StoredForm], sizes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Yield every module that cannot be stored as it says, and why: found, and what is possible.

    A form must save values. Members of a group that shares a basis are weighed together: their
    outputs stand on top of each other in one weight [sum of O, I].

    Args:
        sizes: Outputs and inputs of every module.
    """
    groups: dict[str, list[str]] = {}
    for name, form in forms.items():
        groups.setdefault(form.basis or name, []).append(name)
    for name, form in forms.items():
        module, (outputs, inputs) = FORMS[form.form], sizes[name]
        reason = _field_misfit(form, outputs, inputs)
        if not reason and form.basis:
            reason = _basis_misfit(name, forms, sizes)
        elif not reason:
            if "basis" in module.optional:
                outputs = sum(sizes[member][0] for member in groups[name])
            reason = module.misfit(form, outputs, inputs)
        if reason:
            yield name, reason


def install_forms(model: PreTrainedModel, quantization_config: Mapping[str, Any]) -> None:
    """Replace in place every module that the config names by its form, with empty parameters.

    Device and dtype are those of the weight that goes; on the meta device nothing is allocated.
    A model without the head, whose modules lack the `model.` in front, takes the same config.
    A shared basis is registered as tied, which loading and saving act on; it is not yet tied.

    Raises:
        InputError: The config is invalid, names no linear of this model, or gives a form that
            does not fit the linear or saves nothing.
    """
    forms = read_forms(quantization_config)
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
            basis = f"{linears[form.basis][0]}.down.weight"
            # the model's map is read when weights are loaded, the module's when they are saved
            model.all_tied_weights_keys[f"{name}.down.weight"] = basis
            replacement._tied_weights_keys = {"down.weight": basis}  # type: ignore[assignment]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def features(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of an `nn.Linear`, or of a `Conv1D`, whose weight is [inputs, outputs]."""
    size = module.weight.shape
    assert isinstance(size, torch.Size)
    return (size[0], size[1]) if isinstance(module, Conv1D) else (size[1], size[0])


def _read_form(where: str, entry: Any) -> StoredForm:
    form = entry.get("form") if isinstance(entry, Mapping) else None
    module = FORMS.get(form) if isinstance(form, str) else None
    if module is None or set(entry) - set(module.optional) != {"form", *module.fields}:
        known = "; ".join(f"{name} with {', '.join(each.fields)}" for name, each in FORMS.items())
        raise InputError(f"{where}: found {reprlib.repr(entry)}, need a form: {known}")
    for name, value in entry.items():
        if type(value) is not (int if name in ("rank", "nonzeros") else str):
            need = "a whole number" if name in ("rank", "nonzeros") else "a name"
            raise InputError(f"{where}.{name}: found {reprlib.repr(value)}, need {need}")
        if type(value) is int and abs(value) >= 2**63:
            raise InputError(f"{where}.{name}: found {reprlib.repr(value)}, need one below 2^63")
    return StoredForm(**entry)


def _field_misfit(form: StoredForm, out_features: int, in_features: int) -> str:
    """Reason why a linear of this size cannot have the fields that are given; empty if it can."""
    fields, optional = FORMS[form.form].fields, FORMS[form.form].optional
    for name, value in (("rank", form.rank), ("nonzeros", form.nonzeros)):
        if (value > 0) != (name in fields) or value < 0:
            linear = f"a [{out_features}, {in_features}] linear"
            need = "1 or more" if name in fields else "none"
            return f"found {name} {value} for {form.form}, {linear} takes {need}"
    if form.basis and "basis" not in optional:
        having = ", ".join(name for name, each in FORMS.items() if "basis" in each.optional)
        return f"found a shared basis for {form.form}, only {having} has one"
    return ""


def _basis_misfit(
    name: str, forms: Mapping[str, StoredForm], sizes: Mapping[str, tuple[int, int]]
) -> str:
    """Reason why the basis that a linear names cannot be its own."""
    form, basis = forms[name], forms.get(forms[name].basis)
    if basis is None or basis.form != form.form or basis.basis:
        return f"found basis {reprlib.repr(form.basis)}, need a {form.form} linear with its own"
    if (basis.rank, sizes[form.basis][1]) != (form.rank, sizes[name][1]):
        return (
            f"found rank {form.rank} of {sizes[name][1]} inputs, its basis {form.basis} has "
            f"rank {basis.rank} of {sizes[form.basis][1]}"
        )
    return ""


def _find_linears(
    model: PreTrainedModel, forms: Mapping[str, StoredForm]
) -> dict[str, tuple[str, nn.Linear | Conv1D]]:
    """Name in the model and module of every linear, by its name in the config."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name.removeprefix(prefix): (name, module) for name, module in model.named_modules()}
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    linears = {}
    for given in forms:
        where = f"config.json: quantization_config.modules[{given!r}]"
        name, module = modules.get(given.removeprefix(prefix), ("", None))
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
