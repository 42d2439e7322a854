"""The import rules of the architecture, per package and sub-package, and the limits of files.

A package may import the packages on its line, the outside packages there, the standard library and
itself; nothing else. Imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

PLAIN = "errors events readable version"
MODELS = "models.survey models.shards models.inputs models.statistics models.training models.forms "
MODELS += "models.checkpoint models.evaluation"
MAY_IMPORT = {
    # values: no torch, no Ray, no transformers
    "errors": "",
    "events": "",
    "readable": "",
    "version": "",
    "usage": "readable",
    "store": "errors numpy pyarrow safetensors",
    "plan": "errors store numpy",
    "recipe": "errors",
    "allocate": "errors plan recipe numpy",
    # numerics
    "device": "errors torch",
    "linalg": "errors torch",
    # curves are arrays of numpy, so that a driver without torch reads them
    "methods": "errors plan recipe linalg torch numpy",
    # models: each may import those above it
    "models.forms": "errors torch transformers",
    "models.checkpoint": "errors version plan store device models.forms torch safetensors",
    "models.survey": "errors plan store models.forms models.checkpoint torch transformers "
    "accelerate huggingface_hub",
    "models.inputs": "errors store models.checkpoint torch numpy pyarrow huggingface_hub datasets "
    "transformers",
    "models.shards": "errors plan store device models.forms models.checkpoint models.survey torch "
    "transformers accelerate numpy",
    "models.statistics": "plan linalg models.shards torch transformers",
    "models.evaluation": "errors plan store device linalg models.forms models.checkpoint "
    "models.survey models.shards torch safetensors transformers numpy",
    "models.training": "errors plan recipe device linalg models.forms models.shards "
    "models.statistics models.evaluation torch transformers",
    "hf": "errors version models.forms models.checkpoint models.survey models.shards torch "
    "transformers",
    # execution: knows no model
    "runtime": f"{PLAIN} usage recipe plan store device torch",
    "runtime.ray": f"{PLAIN} usage recipe store device runtime torch ray grpc",
    # what a run takes, without running
    "forecast": f"{PLAIN} allocate plan recipe store models.checkpoint models.survey "
    "models.training runtime",
    "resolve": "errors allocate methods recipe models.training",
    "stages.context": f"{PLAIN} usage allocate device forecast linalg methods plan recipe resolve "
    f"runtime store torch numpy safetensors {MODELS} runtime.ray",
    "stages": f"{PLAIN} plan recipe runtime stages.context store",
    "pages": f"{PLAIN} plan recipe store usage numpy",
    "searching": "errors plan recipe store",
    "api": f"{PLAIN} forecast hf pages plan recipe runtime runtime.ray searching stages "
    f"stages.context stages.evaluate store transformers {MODELS}",
    "cli": f"{PLAIN} api forecast plan recipe usage",
    "__main__": "cli",
}
STAGE = f"{MAY_IMPORT['stages.context']} stages.context hf"
"""What a stage may import; no stage imports another."""
KNOWN = {
    "runtime": "runtime.ray",
    "stages": "stages.evaluate stages.write",
    "stages.context": "stages.pivot stages.refine stages.refit stages.score_masks "
    "stages.score_sensitivities stages.train stages.walk stages.write",
    "stages.pivot": "stages.refine",
    "stages.write": "stages.pivot stages.refit",
}
"""Imports that break the rules today; an entry may only go."""
NESTED = {"models", "runtime", "stages"}
"""Packages whose sub-packages have rules of their own."""
HEAVY = {"accelerate", "datasets", "huggingface_hub", "pyarrow", "ray", "torch", "transformers"}
PACKAGE = Path(__file__).parents[2] / "orchestrator"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """Dotted name of a file, without the package's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def package_of(module: str) -> str:
    """The package whose line says what a module may import."""
    parts = module.split(".")
    deep = parts[0] in NESTED and len(parts) > 1 and ".".join(parts[:2]) not in LEAVES
    return ".".join(parts[:2]) if deep else parts[0]


LEAVES = {name for name, path in MODULES.items() if path.name != "__init__.py"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules of this package, and top-level names outside the standard library, of a file."""
    own, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            package, _, inner = module.partition(".")
            if package != "orchestrator":
                outside.add(package)
                continue
            candidates = (f"{inner}.{name}".strip("."), inner)
            own |= {next((each for each in candidates if each in MODULES), "")} - {""}
    return own, outside - set(sys.stdlib_module_names)


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a statement has imported in a process of its own."""
    code = f"{statement}\nimport sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_its_package_may(path):
    """A package imports nothing that its line of the map does not name."""
    package = package_of(module_of(path))
    allowed = MAY_IMPORT.get(package, STAGE if package.startswith("stages.") else "")
    allowed = f"{allowed} {KNOWN.get(package, '')}".split()
    own, outside = imports(path)
    surplus = ({package_of(each) for each in own} | outside) - {package, *allowed}
    assert not surplus, f"{package} must not import {sorted(surplus)}"


def test_no_known_breach_is_left_out():
    """Every import that `KNOWN` lets pass exists; mended ones leave the list."""
    found = {
        (package_of(module), package_of(each))
        for module, path in MODULES.items()
        for each in imports(path)[0]
    }
    listed = {(package, each) for package, names in KNOWN.items() for each in names.split()}
    assert listed <= found


def test_ray_is_imported_by_its_package_alone():
    """Only `runtime.ray` imports Ray, and there one file its private modules."""
    users = {path for path in FILES if "ray" in imports(path)[1]}
    assert {package_of(module_of(path)) for path in users} == {"runtime.ray"}
    private = {path.name for path in users if any(map(is_private_ray, syntax(path)))}
    assert private == {"cluster.py"}


def syntax(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def is_private_ray(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.ImportFrom) and "ray._private" in ast.unparse(node)


KNOWN_CYCLE = {
    "stages.context.compression",
    "stages.context.trained_stage",
    *(f"stages.{name}.job" for name in ("pivot", "refine", "refit", "score_masks")),
    *(f"stages.{name}.job" for name in ("score_sensitivities", "train", "walk", "write")),
}
"""Files that import each other today; the set may only shrink."""


def test_no_file_imports_itself_by_way_of_others():
    """The graph of files has no cycle, lazy imports and TYPE_CHECKING counted."""
    graph = {module: imports(path)[0] - {module} for module, path in MODULES.items()}
    while ready := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - ready for module, needs in graph.items() if module not in ready}
    # what is left is in a cycle, or imports one
    while outer := graph.keys() - set().union(*graph.values()) if graph else set():
        graph = {module: needs for module, needs in graph.items() if module not in outer}
    assert graph.keys() == KNOWN_CYCLE


def test_folders_and_files_are_small():
    """A folder holds at most 20 files; a file has at most 400 lines, but for those known."""
    folders = Counter(path.parent for path in PACKAGE.rglob("*.py"))
    assert max(folders.values()) <= 20
    long = {module_of(path) for path in FILES if len(path.read_text().splitlines()) > 400}
    assert long == LONG_FILES


LONG_FILES = {"api", "forecast.forecast", "stages.context.compression"}


@pytest.mark.parametrize(
    "statement",
    [
        "import orchestrator",
        "import orchestrator.api",
        "import orchestrator.models.survey.select",
        "import orchestrator.allocate",
        "import orchestrator.methods",
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
    root = PACKAGE.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = set(settings["package-data"]["orchestrator"])
    package = root / "orchestrator"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    others = {str(p) for p in files if p.suffix != ".py" and "__pycache__" not in p.parts}
    assert others == named
