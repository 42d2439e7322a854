# Copy of orchestrator/models/forms/config.py, by scripts/vendor_forms.py; change that file.
"""Forms of the linears of a model, as its config has them: fields, checks, sizes that fit.

Needs no transformers: programs with models of their own read checkpoints by this file too.
"""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator_sglang.shared.forms.errors import InputError
from orchestrator_sglang.shared.forms import FORMS
from orchestrator_sglang.shared.forms.base import StoredForm

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

    All fields are checked as far as they can be without the model. No value of the config is used
    as code, a class or a path.

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
