"""The import map of the README's architecture section, checked.

A part may import the parts and the outside packages on its line, the standard library and itself;
nothing else. What is imported inside a function counts too.
"""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ALL_PARTS = (
    "errors options plan groups shards values recipe result linalg allocate store methods models "
    "hf cluster forecast"
)
MAY_IMPORT = {
    "errors": "",
    "plan": "errors numpy",
    "options": "errors",
    "groups": "plan",
    "shards": "",
    "recipe": "errors values",
    "values": "errors",
    "result": "plan store",
    "progress": "",
    "usage": "progress",
    "forecast": "allocate errors groups models options plan progress recipe shards store",
    "pages": "errors plan recipe progress store usage numpy",
    "linalg": "errors torch",
    "allocate": "errors options plan numpy",
    "store": "errors plan numpy pyarrow safetensors",
    "methods": "errors options plan groups linalg torch",
    "models": "errors options plan shards linalg store torch transformers accelerate safetensors "
    "numpy pyarrow huggingface_hub datasets",
    "hf": "errors plan models torch transformers",
    "cluster": f"{ALL_PARTS} progress usage torch numpy safetensors ray grpc",
    "api": f"{ALL_PARTS} pages searching transformers",
    "searching": "api errors options recipe result store",
    "arguments": "recipe values",
    "cli": "arguments errors forecast recipe result progress usage values api",
    "__main__": "cli",
}
HEAVY = {"accelerate", "datasets", "huggingface_hub", "pyarrow", "ray", "torch", "transformers"}
PACKAGE = Path(__file__).parents[2] / "orchestrator"
PARTS = {path.stem for path in PACKAGE.iterdir()}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Top-level names outside the standard library, with our own package replaced by its part.

    What the package itself holds, its version, is nobody's part.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            part = inner.partition(".")[0]
            found |= {part} & PARTS if package == "orchestrator" else {package}
    return found - set(sys.stdlib_module_names)


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a statement has imported in a process of its own."""
    code = f"{statement}\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_its_part_may(path):
    """A part imports nothing that its line of the map does not name."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    surplus = imported(path) - {part} - set(MAY_IMPORT[part].split())
    assert not surplus, f"{part} must not import {sorted(surplus)}"


def test_only_cluster_knows_ray():
    """Nothing outside `cluster` imports Ray, not even inside a function."""
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES if "ray" in imported(path)} <= {
        "cluster"
    }


@pytest.mark.parametrize(
    "statement",
    [
        "import orchestrator",
        "import orchestrator.api",
        "import orchestrator.models.survey.select",
        "import orchestrator.allocate",
        "import orchestrator.pages",
        "import orchestrator.forecast.forecast",
    ],
)
def test_light_import(statement):
    """What a laptop imports to look at a run or a plan loads no heavy package."""
    assert loaded_by(statement) == set()


@pytest.mark.parametrize(
    "command",
    [
        *("", "plan", "measure", "compress", "retarget", "evaluate", "export", "status", "report"),
        *("compare", "clean", "submit", "verify"),
    ],
)
def test_help_is_light(command):
    """`--help` answers without importing a heavy package, numpy included."""
    call = f"from orchestrator.cli.main import main\ntry: main({[*command.split(), '--help']})"
    assert loaded_by(f"{call}\nexcept SystemExit: pass") == set()


def test_plan_is_light(tmp_path):
    """`plan` forecasts from a config without loading a heavy package."""
    numbers = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    config = {"model_type": "llama", "num_attention_heads": 2} | dict.fromkeys(numbers, 64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    flags = ["plan", str(path), "--keep=0.8", "--preset=best"]
    call = f"from orchestrator.cli.main import main; assert main({flags!r}) == 0"
    assert loaded_by(call) == set()


def test_status_is_light(tmp_path):
    """`status` reads a run without loading a heavy package."""
    from orchestrator.store.run import RunDirectory

    run = RunDirectory(tmp_path / "run")
    run.claim({})
    run.write_status(state="done")
    call = (
        f"from orchestrator.cli.main import main; assert main(['status', {str(run.root)!r}]) == 0"
    )
    assert loaded_by(call) == set()


def test_every_file_of_the_package_goes_into_a_wheel():
    """Files that are not Python are named as package data, such as the rates that `plan` reads."""
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = set(settings["package-data"]["orchestrator"])
    package = root / "orchestrator"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    others = {str(p) for p in files if p.suffix != ".py" and "__pycache__" not in p.parts}
    assert others == named
