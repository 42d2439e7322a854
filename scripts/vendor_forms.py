"""Copies of sources for the packages that serve checkpoints, and their comparison.

    python scripts/vendor_forms.py            compare; prints the files that differ
    python scripts/vendor_forms.py --write    write the copies anew

A server's environment has no orchestrator: it pins another release of transformers. The package for
vLLM has copies of the forms, the one for SGLang these and copies of what is not vLLM's own. Copies
have the same text; imports name the package that they are in.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM = "plugins/vllm/orchestrator_vllm"
SGLANG = "plugins/sglang/orchestrator_sglang/shared"
FOLDERS = (f"{VLLM}/forms", SGLANG, f"{SGLANG}/forms")
"""Folders of copies."""
SHARED = ("factored", "layout", "names", "products", "shards")
"""Files of the package for vLLM that need no server."""
HEAD = "# Copy of {source}, by scripts/vendor_forms.py; change that file.\n"
SHARED_DOCSTRING = '"""Copies of the sources that packages for servers share."""\n'
REGISTRY = '''"""Forms of compressed linears: reader of the config, tensors and index codes.

Copies of orchestrator's sources. Of the modules only the class methods are used here.
"""

{imports}

FORMS: dict[str, type[FormLinear]] = {{
{entries}
}}
'''


def vendored() -> dict[str, str]:
    """Return the text of every copy, by path."""
    copies = {f"{VLLM}/forms/{name}": text for name, text in form_copies().items()}
    copies[f"{SGLANG}/__init__.py"] = SHARED_DOCSTRING
    for name, text in form_copies().items():
        copies[f"{SGLANG}/forms/{name}"] = for_sglang(text)
    for name in SHARED:
        copies[f"{SGLANG}/{name}.py"] = for_sglang(copied(f"{VLLM}/{name}.py"))
    return copies


def form_copies() -> dict[str, str]:
    """Return the text of every copy of the forms in the package for vLLM, by name."""
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


def for_sglang(text: str) -> str:
    """Change names of modules in the package for vLLM to those in the package for SGLang."""
    head, newline, body = text.partition("\n") if text.startswith("# Copy of ") else ("", "", text)
    return head + newline + body.replace("orchestrator_vllm.", "orchestrator_sglang.shared.")


def different() -> list[str]:
    """Return the paths of files that are missing, surplus, or not the copies."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    wanted = vendored()
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if found.get(name) != wanted.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the copies")
    if parser.parse_args().write:
        for folder in FOLDERS:
            (ROOT / folder).mkdir(parents=True, exist_ok=True)
            for path in (ROOT / folder).glob("*.py"):
                path.unlink()
        for name, text in vendored().items():
            (ROOT / name).write_text(text, encoding="utf-8")
        return 0
    names = different()
    print(*names, sep="\n")
    return bool(names)


if __name__ == "__main__":
    sys.exit(main())
