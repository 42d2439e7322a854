"""Copies of the forms' sources for the package that serves checkpoints, and their comparison.

    python scripts/vendor_forms.py            compare; prints the files that differ
    python scripts/vendor_forms.py --write    write the copies anew

The server's environment has no orchestrator: it pins another release of transformers. The copies
have the same text; imports name the package that they are in.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIES = ROOT / "plugins/vllm/orchestrator_vllm/forms"
HEAD = "# Copy of {source}, by scripts/vendor_forms.py; change that file.\n"
REGISTRY = '''"""Forms of compressed linears: reader of the config, tensors and index codes.

Copies of orchestrator's sources. Of the modules only the class methods are used here.
"""

{imports}

FORMS: dict[str, type[FormLinear]] = {{
{entries}
}}
'''


def vendored() -> dict[str, str]:
    """Return the text of every file of the copy, by name."""
    from orchestrator.models.forms import FORMS
    from orchestrator.plan.forms import FORMS as SIZES

    own = {name: FORMS[name] for name in FORMS if not SIZES.distribution(name)}
    sources = {"errors.py": "orchestrator/errors.py"}
    files = [
        "base",
        "config",
        "index_codes",
        *(form.__module__.split(".")[-1] for form in own.values()),
    ]
    sources |= {f"{name}.py": f"orchestrator/models/forms/{name}.py" for name in files}
    copies = {name: copied(source) for name, source in sources.items()}
    imports = {f"from {moved(form.__module__)} import {form.__name__}" for form in own.values()}
    imports.add("from orchestrator_vllm.forms.base import FormLinear")
    entries = [f'    "{name}": {form.__name__},' for name, form in own.items()]
    registry = REGISTRY.format(imports="\n".join(sorted(imports)), entries="\n".join(entries))
    return {"__init__.py": registry, **copies}


def copied(source: str) -> str:
    """Return the text of a file with its imports changed."""
    return HEAD.format(source=source) + moved((ROOT / source).read_text(encoding="utf-8"))


def moved(text: str) -> str:
    """Change names of modules to those of the copies."""
    text = text.replace("orchestrator.models.forms", "orchestrator_vllm.forms")
    return text.replace("orchestrator.errors", "orchestrator_vllm.forms.errors")


def different() -> list[str]:
    """Return the names of files that are missing, surplus, or not the copies."""
    found = {path.name: path.read_text(encoding="utf-8") for path in COPIES.glob("*.py")}
    wanted = vendored()
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if found.get(name) != wanted.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the copies")
    if parser.parse_args().write:
        COPIES.mkdir(parents=True, exist_ok=True)
        for path in COPIES.glob("*.py"):
            path.unlink()
        for name, text in vendored().items():
            (COPIES / name).write_text(text, encoding="utf-8")
        return 0
    names = different()
    print(*names, sep="\n")
    return bool(names)


if __name__ == "__main__":
    sys.exit(main())
