"""The file that lets a checkpoint load where this package is not installed.

It is put together from the sources of the forms, of the experts that have linears of their own, of
the config that names them, of the rules that split them over ranks and of the quantizer that
installs them, so there is one implementation and two ways to reach it. A form of another package is
part of the file if the checkpoint has it.
"""

import ast
import inspect
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from types import ModuleType

import transformers

from orchestrator.errors import InputError, UsageError
from orchestrator.hf import quantizer, tensor_parallel
from orchestrator.models.checkpoint.auto_classes import auto_classes
from orchestrator.models.experts import layout, module, replace, router
from orchestrator.models.forms import FORMS, base, config, guards, index_codes, install
from orchestrator.models.forms.base import FormLinear
from orchestrator.models.survey.image_models import reads_images
from orchestrator.plan.forms import FORMS as SIZES
from orchestrator.version import __version__

_HEAD = '''"""Loads this checkpoint where orchestrator is not installed.

    {auto_class}.from_pretrained(DIRECTORY, trust_remote_code=True)

Made by orchestrator {version} from its own sources; needs torch and transformers only.
SPDX-License-Identifier: Apache-2.0
"""

{imports}


class InputError(ValueError):
    """The checkpoint is damaged, or of a format that this file does not know."""


'''
_TAIL = '''

register()


class {config_class}(transformers.{config_class}):
    """The native config under its native name: importing this file has registered the format."""


class {architecture}(transformers.{architecture}):
    """The native model under its native name."""
'''


ALLOWED = {"orchestrator", "torch", "transformers", *sys.stdlib_module_names}
"""Packages that the file of a form may import."""


def bootstrap_source(architecture: str, forms: Collection[str] = ()) -> str:
    """Source of `modeling_orchestrator.py` for a checkpoint of this class of transformers.

    The classes in it have the native ones' names, because transformers writes the name of the
    model class into `architectures` when the model is saved, other programs read that, and a model
    is only registered for a config of the name that it states. The class of the config is there
    for programs that read the config first, with `trust_remote_code`.

    Args:
        forms: Names of the forms in the checkpoint. Built-in ones are always part of the source.

    Raises:
        InputError: The name is not that of a class, so it cannot be written into a source.
        UsageError: The file of a form from another package cannot be part of the source.
    """
    if not architecture.isidentifier():
        raise InputError(f"config.json: architectures: {architecture!r} is not a class name")
    included = {name: FORMS[name] for name in FORMS if name in forms or _package(name) == ""}
    imports, bodies = {"import transformers"}, []
    of_forms = dict.fromkeys(sys.modules[form.__module__] for form in included.values())
    below = config, layout, module, replace, router, guards, install, tensor_parallel, quantizer
    for file in base, index_codes, *of_forms, *below:
        if file is config:
            bodies.append(_registry(included))
        found, body = _split(file)
        imports |= found
        bodies.append(body)
    for name in included:
        if _package(name):
            _check_joins(name, bodies)
    lines = sorted(imports, key=lambda text: (text.startswith("from"), text))
    head = _HEAD.format(
        auto_class=auto_classes(reads_images(architecture))[-1],
        version=__version__,
        imports="\n".join(lines),
    )
    config_class = getattr(transformers, architecture).config_class.__name__
    names = {"architecture": architecture, "config_class": config_class}
    return head + "\n\n\n".join(bodies) + _TAIL.format(**names)


def _package(form: str) -> str:
    """Package that a form is from; empty for a built-in one."""
    return SIZES.distribution(form)


def _check_joins(form: str, bodies: Collection[str]) -> None:
    """Raise UsageError unless a form's file can stand among the others.

    It may import torch, transformers, the standard library and this package's files of forms, and
    no name in it may be one of another file.
    """
    module = sys.modules[FORMS[form].__module__]
    where = f"{_package(form)}: {module.__file__}, which every checkpoint with the form contains"
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "" if node.level == 0 else "."]
        for name in names:
            is_ours = name.startswith("orchestrator")
            is_form = name.startswith("orchestrator.models.forms") or name == "orchestrator.errors"
            if name.partition(".")[0] not in ALLOWED or (is_ours and not is_form):
                raise UsageError(
                    f"{where}: imports {name}; it may import torch, transformers, "
                    "orchestrator.errors and orchestrator.models.forms"
                )
    defined = Counter(name for body in bodies for name in _defined(body))
    if doubled := [name for name in _defined(_split(module)[1]) if defined[name] > 1]:
        raise UsageError(f"{where}: defines {doubled[0]}, as another file of the source; rename it")


def _defined(source: str) -> list[str]:
    """Names of the functions and classes of a source."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [each.name for each in ast.parse(source).body if isinstance(each, kinds)]


def _registry(forms: Mapping[str, type[FormLinear]]) -> str:
    """Source of the registry of these forms."""
    lines = (f"    {name!r}: {form.__name__}," for name, form in forms.items())
    return "\n".join(["FORMS = {", *lines, "}"])


@cache
def _split(module: ModuleType) -> tuple[frozenset[str], str]:
    """A module's imports from outside the package, and its text below all imports."""
    source = inspect.getsource(module)
    statements = [s for s in ast.parse(source).body if isinstance(s, ast.Import | ast.ImportFrom)]
    below = "\n".join(source.splitlines()[statements[-1].end_lineno :])
    imports = {ast.get_source_segment(source, s) or "" for s in statements}
    own = frozenset(text for text in imports if not text.startswith("from orchestrator"))
    return own, below.strip()
