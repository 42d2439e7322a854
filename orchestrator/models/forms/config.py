"""Forms of the linears of a model, as its config has them: fields, checks, sizes that fit.

Needs no transformers: programs with models of their own read checkpoints by this file too.
"""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import StoredForm

METHOD = "orchestrator"
FORMAT_VERSION = 1
EXPERTS_VERSION = 2
"""Format of checkpoints with compressed experts, which programs for the other one cannot load."""
ROUTER_VERSION = 3
"""Format of those whose routers have rows only for the experts that are not dropped."""
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
EXPERTS = "experts"
"""Field of the second format: experts modules by name, with the linears of all their experts."""
ROUTER, REDUCED = "router", "reduced"
"""Field of the third format, and its value."""
PARTS = ("gate", "up", "down")
"""Linears of an expert; the first is left out where experts have no gate."""
DROPPED = "dropped"
"""Form of the linears of an expert that is gone."""
NUMBERS = ("rank", "nonzeros")
ENTRY_FIELDS = ("form", *NUMBERS, "index", "basis")
"""Fields of the linears of one name in all experts of a module: a list with an item for each
expert, 0 or empty if it has none, or one value for all that are not dense."""


def read_forms(quantization_config: Mapping[str, Any]) -> dict[str, StoredForm]:
    """Read the form of every module that is not dense, by module name, in the config's order.

    All fields are checked as far as they can be without the model. No value of the config is used
    as code, a class or a path. Linears of experts follow the others.

    Raises:
        InputError: A field is missing, unknown or of the wrong kind, or the format is a newer one.
    """
    where = "config.json: quantization_config"
    method = quantization_config.get("quant_method")
    if method != METHOD:
        raise InputError(f"{where}.quant_method: found {reprlib.repr(method)}, need {METHOD!r}")
    version = quantization_config.get("format_version")
    if type(version) is not int or not FORMAT_VERSION <= version <= ROUTER_VERSION:
        raise InputError(
            f"{where}.format_version: found {reprlib.repr(version)}, this program reads "
            f"{FORMAT_VERSION} to {ROUTER_VERSION}; load it with the version of orchestrator "
            "that wrote it"
        )
    known = (*FIELDS, EXPERTS, ROUTER)[: len(FIELDS) + version - FORMAT_VERSION]
    if unknown := [field for field in quantization_config if field not in known]:
        raise InputError(
            f"{where}: unknown field {reprlib.repr(unknown[0])}; known are {', '.join(known)}"
        )
    if version == ROUTER_VERSION and quantization_config.get(ROUTER) != REDUCED:
        found = reprlib.repr(quantization_config.get(ROUTER))
        raise InputError(f"{where}.{ROUTER}: found {found}, need {REDUCED!r}")
    entries = dict(_object(where, "modules", quantization_config))
    if version > FORMAT_VERSION:
        for module, parts in _object(where, EXPERTS, quantization_config).items():
            for name, entry in _read_experts(f"{where}.{EXPERTS}[{module!r}]", module, parts):
                if name in entries:
                    raise InputError(f"{where}: {name!r} is in modules and in {EXPERTS}")
                entries[name] = entry
    return {
        name: _read_form(f"{where}.modules[{name!r}]", entry) for name, entry in entries.items()
    }


def write_forms(
    forms: Mapping[str, StoredForm],
    experts: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    reroutes: bool = False,
) -> dict[str, Any]:
    """Make the fields `format_version`, `modules`, with compressed experts `experts`, and `router`.

    Args:
        experts: By the name of an experts module and of a linear, its names in all experts; empty
            if experts are stored as the model's class does.
        reroutes: True if routers have no rows for dropped experts.
    """
    inside = {name for parts in experts.values() for names in parts.values() for name in names}
    modules = {name: form.to_json() for name, form in forms.items() if name not in inside}
    if not experts:
        return {"format_version": FORMAT_VERSION, "modules": modules}
    written = {
        module: {part: _column(forms, names) for part, names in parts.items()}
        for module, parts in experts.items()
    }
    compressed = {
        module: {part: column for part, column in parts.items() if column}
        for module, parts in written.items()
    }
    fields = {"modules": modules, EXPERTS: compressed}
    if reroutes:
        return {"format_version": ROUTER_VERSION, **fields, ROUTER: REDUCED}
    return {"format_version": EXPERTS_VERSION, **fields}


def misfits(
    forms: Mapping[str, StoredForm], sizes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Yield every module that cannot be stored as it says, and why: found, and what is possible.

    A form must save values. Members of a group that shares a basis are weighed together: their
    outputs stand on top of each other in one weight [sum of O, I], or their inputs side by side
    if the basis is one of outputs, [O, sum of I].

    Args:
        sizes: Outputs and inputs of every module.
    """
    groups: dict[str, list[str]] = {}
    for name, form in forms.items():
        groups.setdefault(form.basis or name, []).append(name)
    for name, form in forms.items():
        module, (outputs, inputs) = FORMS[form.form], sizes[name]
        reason = _field_misfit(form, outputs, inputs) or _dropped_misfit(name, forms)
        if not reason and form.basis:
            reason = _basis_misfit(name, forms, sizes)
        elif not reason:
            if "basis" in module.optional and module.basis_tensor == "weight":
                inputs = sum(sizes[member][1] for member in groups[name])
            elif "basis" in module.optional:
                outputs = sum(sizes[member][0] for member in groups[name])
            reason = module.misfit(form, outputs, inputs)
        if reason:
            yield name, reason


def _object(where: str, field: str, quantization_config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = quantization_config.get(field)
    if not isinstance(found, Mapping):
        raise InputError(f"{where}.{field}: found {reprlib.repr(found)}, need an object")
    return found


def _read_experts(where: str, module: str, parts: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the linears of a module that are not dense, with entries as `modules` has them."""
    if not isinstance(parts, Mapping) or not set(parts) <= {*PARTS}:
        raise InputError(f"{where}: found {reprlib.repr(parts)}, need {', '.join(PARTS)}")
    for part, columns in parts.items():
        if not isinstance(columns, Mapping) or not set(columns) <= {*ENTRY_FIELDS}:
            known = ", ".join(ENTRY_FIELDS)
            raise InputError(f"{where}.{part}: found {reprlib.repr(columns)}, need {known}")
        lengths = {len(column) for column in columns.values() if isinstance(column, list)}
        if len(lengths) != 1:
            found = ", ".join(map(str, sorted(lengths))) or "no list"
            raise InputError(
                f"{where}.{part}: found {found}, need lists of one length, an item for each expert"
            )
        for expert in range(*lengths):
            row = {
                name: column[expert] if isinstance(column, list) else column
                for name, column in columns.items()
            }
            given = {name: each for name, each in row.items() if not _is_default(each)}
            # an expert is dense if its items of all lists are defaults
            if any(isinstance(columns[name], list) for name in given):
                yield f"{module}.{expert}.{part}", given


def _is_default(value: Any) -> bool:
    """Test for the value of a field that is not given: 0 or an empty name."""
    return type(value) in (int, str) and not value


def _column(forms: Mapping[str, StoredForm], names: Sequence[str]) -> dict[str, Any]:
    """Make the entry of the linears of one name; empty if all are dense."""
    rows = [forms[name].to_json() if name in forms else {} for name in names]
    columns: dict[str, Any] = {}
    for field in ENTRY_FIELDS:
        default = 0 if field in NUMBERS else ""
        column = [row.get(field, default) for row in rows]
        if any(column):
            columns[field] = column
    compressed = [row for row in rows if row]
    if all(any(row.get(field) for field in NUMBERS) for row in compressed):
        for field in columns.keys() - {*NUMBERS}:
            if len({row.get(field) for row in compressed}) == 1:
                columns[field] = compressed[0][field]
    return columns


def _read_form(where: str, entry: Any) -> StoredForm:
    form = entry.get("form") if isinstance(entry, Mapping) else None
    module = FORMS.get(form) if isinstance(form, str) else None
    if module is None or set(entry) - set(module.optional) != {"form", *module.fields}:
        known = "; ".join(f"{name} with {', '.join(each.fields)}" for name, each in FORMS.items())
        raise InputError(f"{where}: found {reprlib.repr(entry)}, need a form: {known}")
    for name, value in entry.items():
        if type(value) is not (int if name in NUMBERS else str):
            need = "a whole number" if name in NUMBERS else "a name"
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
        return f"found a shared basis for {form.form}, only {having} have one"
    return ""


def _dropped_misfit(name: str, forms: Mapping[str, StoredForm]) -> str:
    """Reason why a linear cannot be gone, or stay where others of its expert go."""
    expert, _, part = name.rpartition(".")
    others = [f"{expert}.{each}" for each in PARTS[1:]]
    dropped = [other for other in others if other in forms and forms[other].form == DROPPED]
    if forms[name].form == DROPPED:
        if part in PARTS and expert.rpartition(".")[2].isdecimal() and dropped == others:
            return ""
        return f"found {DROPPED}, which all linears of an expert are, or none of them"
    if part in PARTS and dropped:
        return f"found {forms[name].form} in an expert of which {dropped[0]} is {DROPPED}"
    return ""


def _basis_misfit(
    name: str, forms: Mapping[str, StoredForm], sizes: Mapping[str, tuple[int, int]]
) -> str:
    """Reason why the basis that a linear names cannot be its own."""
    form, basis = forms[name], forms.get(forms[name].basis)
    if basis is None or basis.form != form.form or basis.basis:
        return f"found basis {reprlib.repr(form.basis)}, need a {form.form} linear with its own"
    if "rank" not in FORMS[form.form].fields and sizes[form.basis] != sizes[name]:
        return f"found the weight of {form.basis}, {sizes[form.basis]}, its own is {sizes[name]}"
    side = 0 if FORMS[form.form].basis_tensor == "weight" else 1
    own, other = sizes[name][side], sizes[form.basis][side]
    if (basis.rank, other) != (form.rank, own):
        return (
            f"found rank {form.rank} of {own} {('outputs', 'inputs')[side]}, its basis "
            f"{form.basis} has rank {basis.rank} of {other}"
        )
    return ""
