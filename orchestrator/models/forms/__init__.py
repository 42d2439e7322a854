"""Modules of compressed linears by form, with their tensors, and the config that names them.

Sizes of the same forms, without torch, are in `orchestrator.plan.forms`, where a form names its
module. A form's line there comes behind those whose modules it imports: in this order the texts of
the modules are joined into one (`orchestrator.hf.bootstrap`).
"""

from collections.abc import Iterator, Mapping

from orchestrator.errors import UsageError
from orchestrator.models.forms.base import FormLinear
from orchestrator.plan.forms import FORMS as SIZES
from orchestrator.registry import NotRegisteredError, find


class FormModules(Mapping[str, type[FormLinear]]):
    """The module of every form but the dense one, imported when it is first used.

    Access raises UsageError if a form of another package is broken.
    """

    def __init__(self) -> None:
        self._modules: dict[str, type[FormLinear]] = {}

    def __getitem__(self, name: str) -> type[FormLinear]:
        path = SIZES[name].module
        if not path:
            raise NotRegisteredError(f"the form {name!r} has no module")
        if path not in self._modules:
            self._modules[path] = _module(name, path)
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return (name for name in SIZES if name != "dense")

    def __len__(self) -> int:
        return len(SIZES) - 1

    def __contains__(self, name: object) -> bool:
        return name != "dense" and name in SIZES


def _module(name: str, path: str) -> type[FormLinear]:
    """Import the module of a form."""
    where = f"{SIZES.distribution(name) or 'orchestrator'}: module {path!r} of the form {name!r}"
    found = find(path, where)
    if not (isinstance(found, type) and issubclass(found, FormLinear) and found.form == name):
        raise UsageError(f"{where}: is {found!r}; it must be a class below FormLinear of this form")
    return found


FORMS = FormModules()
