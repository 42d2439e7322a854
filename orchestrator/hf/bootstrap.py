"""The file that lets a checkpoint load where this package is not installed.

It is put together from the sources of the forms, of the config that names them, of the rules that
split them over ranks and of the quantizer that installs them, so there is one implementation and
two ways to reach it.
"""

import ast
import inspect
import sys
from functools import cache
from types import ModuleType

from orchestrator.errors import InputError
from orchestrator.hf import quantizer, tensor_parallel
from orchestrator.models.forms import FORMS, base, config, index_codes
from orchestrator.version import __version__

FILE = "modeling_orchestrator.py"

_HEAD = '''"""Loads this checkpoint where orchestrator is not installed.

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

Made by orchestrator {version} from its own sources; needs torch and transformers only.
SPDX-License-Identifier: Apache-2.0
"""

{imports}


class InputError(ValueError):
    """The checkpoint is damaged, or of a format that this file does not know."""


'''
_TAIL = '''

register()


class {architecture}(transformers.{architecture}):
    """The native class under its native name: importing this file has registered the format."""
'''


def bootstrap_source(architecture: str) -> str:
    """Source of `modeling_orchestrator.py` for a checkpoint of this class of transformers.

    The class in it has the native one's name, because transformers writes the name of the class
    into `architectures` when the model is saved, and other programs read that.

    Raises:
        InputError: The name is not that of a class, so it cannot be written into a source.
    """
    if not architecture.isidentifier():
        raise InputError(f"config.json: architectures: {architecture!r} is not a class name")
    imports, bodies = {"import transformers"}, []
    of_forms = dict.fromkeys(sys.modules[form.__module__] for form in FORMS.values())
    below = config, tensor_parallel, quantizer
    for module in base, index_codes, *of_forms, *below:
        if module is config:
            bodies.append(_registry())
        found, body = _split(module)
        imports |= found
        bodies.append(body)
    lines = sorted(imports, key=lambda text: (text.startswith("from"), text))
    head = _HEAD.format(version=__version__, imports="\n".join(lines))
    return head + "\n\n\n".join(bodies) + _TAIL.format(architecture=architecture)


def auto_map(architecture: str) -> dict[str, str]:
    """The field of config.json that points transformers to that class."""
    return {"AutoModelForCausalLM": f"{FILE.removesuffix('.py')}.{architecture}"}


def _registry() -> str:
    """Source of the registry, with every form that is registered."""
    lines = (f"    {name!r}: {form.__name__}," for name, form in FORMS.items())
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
