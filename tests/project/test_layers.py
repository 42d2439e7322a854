"""Import rules of the architecture, per package and sub-package, and limits of files.

A package may import only the packages on its line, itself and the standard library. Imports inside
functions and under TYPE_CHECKING count too.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PLAIN = "errors events readable stage_names version"
MODELS = "models.survey models.shards models.inputs models.statistics models.training models.forms "
MODELS += "models.checkpoint models.evaluation models.experts"
PACKAGE = Path(__file__).parents[2] / "orchestrator"
TESTS = PACKAGE.parent / "tests"
ALL = [
    path for place in (PACKAGE, TESTS, PACKAGE.parent / "scripts") for path in place.rglob("*.py")
]
STAGES = " ".join(f"stages.{job.parent.name}" for job in (PACKAGE / "stages").glob("*/job.py"))
MAY_IMPORT = {
    # values: no torch, no Ray, no transformers
    "errors": "",
    "events": "",
    "readable": "",
    "stage_names": "",
    "version": "",
    "usage": "readable",
    "randomness": "torch numpy",
    "store": "errors numpy pyarrow safetensors",
    "registry": "errors",
    "plan": "errors registry store numpy",
    "recipe": "errors",
    "allocate": "errors plan recipe registry numpy",
    # numerics
    "device": "errors torch",
    "linalg": "errors torch",
    # curves are arrays of numpy, so that a driver without torch reads them
    "methods": "errors forecast plan randomness recipe registry linalg torch numpy",
    # models: each may import the ones above it
    "models.experts": "errors torch",
    "models.forms": "errors plan registry models.experts torch transformers",
    "models.checkpoint": "errors version plan store device models.forms torch safetensors",
    "models.survey": "errors plan store device models.experts models.forms models.checkpoint torch "
    "transformers accelerate huggingface_hub",
    "models.inputs": "errors readable store models.checkpoint torch numpy pyarrow huggingface_hub "
    "datasets transformers PIL",
    "models.shards": "errors plan store device models.experts models.forms models.checkpoint "
    "models.survey torch transformers accelerate numpy",
    "models.statistics": "plan device linalg models.experts models.shards torch transformers",
    "models.evaluation": "errors readable plan store device linalg models.forms models.checkpoint "
    "models.survey models.shards torch safetensors transformers numpy",
    "models.training": "errors plan randomness recipe device linalg models.forms models.shards "
    "models.statistics models.evaluation torch transformers",
    "bench": "errors version device hf plan models.checkpoint models.forms torch transformers "
    "numpy",
    "hf": "errors version plan store models.experts models.forms models.checkpoint "
    "models.survey models.shards torch transformers",
    # execution: independent of models
    "progress": "",
    "runtime": f"{PLAIN} usage recipe plan progress store device torch",
    "runtime.ray": f"{PLAIN} usage recipe progress store device runtime torch ray grpc",
    # forecast of a run, without running it
    "forecast": f"{PLAIN} allocate methods plan progress recipe resolve store models.checkpoint "
    "models.survey models.training runtime",
    "stages.base": "errors forecast plan recipe stages.context",
    "stages.context": f"{PLAIN} usage allocate device forecast linalg methods plan progress "
    f"randomness recipe runtime store torch numpy safetensors stages.base {MODELS}",
    "resolve": "errors allocate methods plan recipe stage_names stages stages.base",
    "stages": f"{PLAIN} allocate forecast plan recipe registry resolve runtime runtime.ray store "
    f"torch models.checkpoint models.evaluation models.inputs models.shards models.survey "
    f"stages.base stages.context {STAGES}",
    "catalogue": "errors allocate methods plan registry stages stages.base",
    "pages": f"{PLAIN} plan recipe store usage numpy",
    "searching": "errors plan recipe resolve store",
    "evaluation": "errors recipe",
    "doctor": "readable version packaging",
    "hub": f"{PLAIN} pages plan store models.checkpoint models.evaluation models.forms "
    "huggingface_hub",
    # tasks of lm-evaluation-harness
    "harness": "errors lm_eval numpy torch",
    "api": f"{PLAIN} bench doctor evaluation forecast harness hf hub pages plan recipe resolve "
    f"runtime runtime.ray searching stages stages.context stages.evaluate store transformers "
    f"{MODELS}",
    # experiment trackers, extras; the module of each imports it
    "tracking": "errors events mlflow torch trackio wandb",
    "cli": f"{PLAIN} api catalogue evaluation forecast plan recipe tracking usage rich shtab",
    "__main__": "cli",
}
STAGE = f"{MAY_IMPORT['stages.context']} stages.context hf"
"""Packages that a stage may import; stages do not import each other."""
MAY_IMPORT["stages.evaluate"] = f"{STAGE} harness"
MAY_IMPORT["stages.score_plans"] = f"{STAGE} optuna"
KNOWN = {
    "runtime": "runtime.ray",
}
"""Present violations of the rules; entries may only be removed."""
NESTED = {"models", "runtime", "stages"}
"""Packages whose sub-packages have separate rules."""
HEAVY = {"accelerate", "datasets", "huggingface_hub", "lm_eval", "pyarrow", "ray", "rich", "torch"}
HEAVY |= {"optuna", "transformers"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """Dotted name of a file, without the name of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def package_of(module: str) -> str:
    """Return the package whose rule applies to a module."""
    if module in MAY_IMPORT:
        return module
    parts = module.split(".")
    deep = parts[0] in NESTED and len(parts) > 1 and ".".join(parts[:2]) not in LEAVES
    return ".".join(parts[:2]) if deep else parts[0]


LEAVES = {name for name, path in MODULES.items() if path.name != "__init__.py"}


@cache
def syntax(path: Path) -> list[ast.AST]:
    """Every node of a file, parsed once."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the modules of this package and the external top-level packages that a file
    imports."""
    own, outside = set(), set()
    for node in syntax(path):
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


PROBE = """
import json, sys
added, before = {}, set()
for statement in json.loads(sys.argv[1]):
    exec(statement, {})
    added[statement], before = [*(sys.modules.keys() - before)], {*sys.modules}
print("\\n" + json.dumps(added), file=sys.stderr)
"""


def loaded_by_each(statements: list[str]) -> dict[str, set[str]]:
    """Return the heavy packages that each statement adds, one after the other in one process."""
    command = [sys.executable, "-c", PROBE, json.dumps(statements)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stderr.splitlines()[-1])
    return {each: {name.partition(".")[0] for name in added[each]} & HEAVY for each in added}


def loaded_by(statement: str) -> set[str]:
    """Return the heavy packages imported by a statement in a separate process."""
    return loaded_by_each([statement])[statement]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_its_package_may(path):
    """A package imports only the packages in its line of the map."""
    package = package_of(module_of(path))
    allowed = MAY_IMPORT.get(package, STAGE if package.startswith("stages.") else "")
    allowed = f"{allowed} {KNOWN.get(package, '')}".split()
    own, outside = imports(path)
    surplus = ({package_of(each) for each in own} | outside) - {package, *allowed}
    assert not surplus, f"{package} must not import {sorted(surplus)}"


def test_no_known_breach_is_left_out():
    """Every import in `KNOWN` exists, so that fixed ones leave the list."""
    found = {
        (package_of(module), package_of(each))
        for module, path in MODULES.items()
        for each in imports(path)[0]
    }
    listed = {(package, each) for package, names in KNOWN.items() for each in names.split()}
    assert listed <= found


def test_ray_is_imported_by_its_package_alone():
    """Only `runtime.ray` imports Ray, and only one of its files Ray's private modules."""
    users = {path for path in FILES if "ray" in imports(path)[1]}
    assert {package_of(module_of(path)) for path in users} == {"runtime.ray"}
    private = {path.name for path in users if any(map(is_private_ray, syntax(path)))}
    assert private == {"cluster.py"}


def test_optuna_is_imported_by_the_driver_in_one_file():
    """An extra that workers do without: no worker's module imports the file that imports it."""
    (user,) = [module for module, path in MODULES.items() if "optuna" in imports(path)[1]]
    assert user == "stages.score_plans.sampler"
    users = {module for module, path in MODULES.items() if user in imports(path)[0]}
    assert users == {"stages.request", "stages.score_plans.job"}


def is_private_ray(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.ImportFrom) and "ray._private" in ast.unparse(node)


def test_no_file_imports_itself_by_way_of_others():
    """The graph of files has no cycle, including lazy and TYPE_CHECKING imports."""
    graph = {module: imports(path)[0] - {module} for module, path in MODULES.items()}
    while ready := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - ready for module, needs in graph.items() if module not in ready}
    # the rest is in a cycle, or imports one
    assert graph == {}


def test_folders_and_files_are_small():
    """A folder has at most 20 files, and a file at most 400 lines."""
    assert max(Counter(path.parent for path in ALL).values()) <= 20
    assert [path for path in ALL if len(path.read_text().splitlines()) > 400] == []


def test_functions_are_small():
    """A function has at most 60 lines, docstring included, and four positional parameters.

    pytest passes fixtures by name, so parameters of tests are not counted.
    """
    for path in ALL:
        for node in syntax(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path}: {node.name}"
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{where} has {lines} lines"
                if path.is_relative_to(TESTS):
                    continue
                given = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
                count = len(given) - (given[:1] in (["self"], ["cls"]))
                assert count <= 4, f"{where} has {count} positional parameters"


QUESTIONS = {"what", "whether", "how", "where", "when", "which", "who", "why", "whose"}
RELATIVES = {"of", "those", "so", "there"}


def test_docstrings_begin_with_a_noun_or_a_verb():
    """No docstring begins as a relative clause or a fragment of one."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in ALL:
        for node in syntax(path):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            first = re.match(r"[A-Za-z]*", text or "")[0].lower()
            assert first not in QUESTIONS | RELATIVES, f"{path}: {text.splitlines()[0]}"


def test_tasks_and_jobs_are_one_level_below_their_base():
    """Common parts of stages are values that they hold, not classes above them."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for path in FILES
        for node in syntax(path)
        if isinstance(node, ast.ClassDef)
    }
    for base in ("Task", "Worker", "StageJob", "StageCost"):
        below = {name for name, found in bases.items() if base in found}
        assert below
        assert {name for name, found in bases.items() if below & found} == set()


def test_class_names_are_unique():
    """A class name stands for one class of package, scripts and tests."""
    places: dict[str, list[Path]] = {}
    for path in ALL:
        for node in syntax(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


LIGHT = [
    "import orchestrator",
    "import orchestrator.api",
    "import orchestrator.models.survey.select",
    "import orchestrator.allocate",
    "import orchestrator.methods",
    "import orchestrator.catalogue",
    "import orchestrator.pages",
    "import orchestrator.pages.live",
    "import orchestrator.forecast.forecast",
    "import orchestrator.stages.plannable",
    *(f"import orchestrator.{name}" for name in MODULES if name.endswith((".spec", ".cost"))),
    *(f"import orchestrator.{name}" for name in MODULES if ".kinds.costs." in name),
]
COMMANDS = [
    *("", "plan", "measure", "compress", "retarget", "evaluate", "export", "status", "report"),
    *("methods", "compare", "clean", "submit", "verify", "watch", "lm-eval"),
    *("doctor", "completion", "push"),
]


def asking_help(command: str) -> str:
    call = f"from orchestrator.cli.main import main\ntry: main({[*command.split(), '--help']})"
    return f"{call}\nexcept SystemExit: pass"


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Heavy packages by import: all in one process, so that none of them may load one."""
    return loaded_by_each(LIGHT)


@pytest.fixture(scope="module")
def loaded_by_help() -> dict[str, set[str]]:
    return loaded_by_each([asking_help(command) for command in COMMANDS])


@pytest.mark.parametrize("statement", LIGHT)
def test_light_import(statement, loaded):
    """Modules for viewing a run or a plan on a laptop import no heavy package."""
    assert loaded[statement] == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_light(command, loaded_by_help):
    """`--help` answers without importing a heavy package, numpy included."""
    assert loaded_by_help[asking_help(command)] == set()


def test_plan_is_light(tmp_path):
    """`plan` forecasts from a config without loading a heavy package."""
    numbers = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    config = {"model_type": "llama", "num_attention_heads": 2} | dict.fromkeys(numbers, 64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    flags = ["plan", str(path), "--keep=0.8", "--preset=best"]
    call = f"from orchestrator.cli.main import main; assert main({flags!r}) == 0"
    assert loaded_by(call) == set()


def test_methods_is_light():
    """`methods` imports every method, allocator, stage and form without a heavy package."""
    call = "from orchestrator.cli.main import main; assert main(['methods']) == 0"
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
