"""Another package adds a method, a kind of result, an allocator, a stage and a form.

The package is `support/plugin`, installed by its entry points alone: no line of orchestrator names
it.
"""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline import contents, run, write_llama, write_text
from plugins import PLUGIN, on_path, recipe_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import orchestrator.hf
from orchestrator import api
from orchestrator.catalogue import REGISTRIES, catalogue
from orchestrator.cli.main import main
from orchestrator.errors import UsageError
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.forms import FORMS as MODULES
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.plan.forms import FORMS
from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import resolve

ROOT = Path(__file__).parents[1]
ADDED = {
    "methods": "diagonal",
    "allocators": "whole-linears",
    "stages": "rescale",
    "forms": "diagonal",
}
SMALL = {"keep": 0.5, "samples": 6, "sequence_length": 48}
RESCALED = {"rescale": {"largest": 100.0}}


@pytest.fixture(scope="module")
def toy():
    with on_path(PLUGIN):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("extending") / "dense", blocks=3)


@pytest.fixture(scope="module")
def text(model):
    return write_text(model.parent / "text.txt")


@pytest.fixture(scope="module")
def result(toy, model, text):
    """A model that the package has compressed, its diagonals scaled."""
    return run(model, model.parent / "out", text, method="diagonal", options=RESCALED)


def cut(result):
    return [name for name, each in result.report["linears"].items() if each["form"] != "dense"]


def command(*arguments, packages, **variables):
    """Run the command in a process of its own, with these directories of packages."""
    paths = os.pathsep.join(map(str, (ROOT, *packages)))
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_it_is_planned(result, model):
    """The forecast has the stages that the run performs, and counts their memory and files."""
    fields = {"model": str(model), "out": "planned", "method": "diagonal", **SMALL}
    found = api.plan(make_recipe(fields | {"options": RESCALED}))
    assert [stage.name for stage in found.stages] == ["calibrate", "rescale", "write"]
    assert found.run["rescale"].parts["diagonals"] > 0
    assert not found.infeasible
    performed = result.report["timings"]["seconds"]
    planned = resolve(make_recipe(fields | {"options": RESCALED})).stage_names
    assert [name for name in performed if name in planned] == [*planned]
    without = api.plan(make_recipe(fields))
    assert [stage.name for stage in without.stages] == ["calibrate", "write"]


def test_the_budget_decides_which_linears_are_cut(result):
    """Dense are the linears that would lose the most energy per value, until no other fits."""
    report, plan = result.report, result.plan
    assert plan.stored_values <= plan.budget_values
    linears = {name: math.prod(each["shape"]) for name, each in report["linears"].items()}
    stored = sum(
        report["linears"][name]["shape"][0] if name in cut(result) else values
        for name, values in linears.items()
    )
    assert 0 < len(cut(result)) < len(linears)
    assert plan.stored_values == stored
    smallest = min(linears[name] - report["linears"][name]["shape"][0] for name in cut(result))
    assert plan.slack_values < smallest


def test_what_is_written_has_the_energy_of_the_dense_outputs(result, model):
    """Each stored diagonal is the dense weight's own times one factor, which makes energies equal.

    The energies are taken here, from second moments of the dense model's inputs.
    """
    dense = load_file(model / "model.safetensors")
    written = load_file(result.out / "model.safetensors")
    lazy_model = LazyModel.open(model, dtype=torch.float32)
    tokens = load_file(next((result.run_dir / "units").rglob("tokens.safetensors")))
    with lazy_model.shard(range(3)) as shard:
        calibration = Calibration(shard, shard.linears, lambda linear, site: "input")
        for index, (ids, mask) in enumerate(zip(tokens["ids"], tokens["mask"], strict=True)):
            calibration.forward(Chunk(index, ids[None].long(), mask[None]))
        for linear in shard.linears:
            if linear.name not in cut(result):
                continue
            weight_OI = dense[f"{linear.name}.weight"]
            rows_O = torch.arange(len(weight_OI))
            columns_O = rows_O % weight_OI.shape[1]
            diagonal_O = written[f"{linear.name}.weight"]
            factors_O = diagonal_O / weight_OI[rows_O, columns_O]
            assert factors_O.std() < 1e-6 * factors_O.mean()
            gram_II = calibration.statistic(linear).matrix_II.double()
            weight_OI = weight_OI.double()
            energy = float(((weight_OI @ gram_II) * weight_OI).sum())
            squares_O = diagonal_O.double().square() * gram_II[columns_O, columns_O]
            assert float(squares_O.sum()) == pytest.approx(energy, rel=1e-4)
            found = result.report["rescale"]["factors"][linear.name]
            assert float(factors_O.mean()) == pytest.approx(found, rel=1e-6)
            calibration.forget([linear])


def test_it_is_verified_reported_and_loaded(result, model, tmp_path):
    """All verbs take the result; the loaded model and its dense export give the same logits."""
    found = api.verify(result.out, against=model)
    assert found["problems"] == []
    assert {*found["linears"]} == {*cut(result)}
    page = api.report(result.run_dir, tmp_path / "page.html").read_text()
    assert "diagonal" in page
    assert "rescale" in page
    assert f"| diagonal | {len(cut(result))} |" in (result.out / "README.md").read_text()
    tokens = torch.arange(3, 23)[None]
    loaded = orchestrator.hf.load(result.out)
    names = [n for n, m in loaded.named_modules() if type(m).__name__ == "DiagonalLinear"]
    assert sorted(names) == sorted(cut(result))
    api.export(result.out, tmp_path / "dense")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        logits, expected = loaded(tokens).logits, exported(tokens).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, expected)


def test_another_size_is_cut_from_its_units(result, model, text, tmp_path):
    """The same bytes as compressed anew, without another decomposition."""
    stages = []
    again = api.retarget(
        result.run_dir,
        tmp_path / "small",
        keep=0.3,
        executor="local",
        on_event=lambda event: stages.append(event["stage"]) if event["event"] == "unit" else None,
    )
    assert set(stages) == {"verify", "rescale", "write"}
    assert len(cut(again)) > len(cut(result))
    fresh = run(model, tmp_path / "fresh", text, method="diagonal", options=RESCALED, keep=0.3)
    small, whole = contents(again.out), contents(fresh.out)
    assert small["model.safetensors"] == whole["model.safetensors"]
    assert small["orchestrator_report.json"] == whole["orchestrator_report.json"]


def test_its_units_are_used_again(result, model, text, tmp_path):
    """The same run with another output decomposes and scales no block again."""
    stages = []
    again = run(
        model,
        tmp_path / "again",
        text,
        method="diagonal",
        options=RESCALED,
        run_dir=str(result.run_dir),
        on_event=lambda event: stages.append(event["stage"]) if event["event"] == "unit" else None,
    )
    assert again.report["files"] == result.report["files"]
    assert set(stages) == {"verify", "write"}


LOAD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("orchestrator", "toy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(3, 23)[None]).logits, sys.argv[2])
"""


def test_it_loads_where_neither_package_is_installed(result, tmp_path):
    """The source of the form is in the checkpoint, and gives the same logits."""
    loaded = orchestrator.hf.load(result.out)
    variables = {"HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(result.out), str(tmp_path / "logits")],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = loaded(torch.arange(3, 23)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_an_installed_form_changes_no_other_checkpoint(toy):
    """The source has a form of another package if the checkpoint has it, and only then."""
    name = "LlamaForCausalLM"
    with_toy = bootstrap_source(name, {"diagonal", "dense"})
    without = bootstrap_source(name, {"low_rank"})
    assert "class DiagonalLinear" in with_toy
    assert "iagonal" not in without
    assert "    'diagonal': DiagonalLinear," in with_toy
    assert ast.parse(with_toy)


def test_it_is_listed(toy, capsys):
    """`orchestrator methods` shows every entry with its package, source and options."""
    found = catalogue()
    for kind, registry in REGISTRIES.items():
        assert [each.name for each in found[kind]] == [*registry]
        assert not any(each.error for each in found[kind])
        assert {each.name: each.package for each in found[kind] if each.package} == {
            ADDED[kind]: "toy 1.0"
        }
    assert main(["methods", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (method,) = (each for each in printed["methods"] if each["name"] == "diagonal")
    assert method == {
        "name": "diagonal",
        "summary": "Keep one weight of each output.",
        "source": "arXiv 0000.00000",
        "departure": "",
        "use": "",
        "package": "toy 1.0",
        "error": "",
        "options": [
            {
                "table": "diagonal",
                "name": "fit",
                "default": False,
                "help": "True: fit the kept weights to the outputs by least squares.",
            }
        ],
    }
    assert main(["methods"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "rescale.largest = 4.0  Largest factor." in lines
    assert lines.count("refinement: see walk") == 2


def test_names_are_listed_without_an_import(toy):
    """Built-in ones come first; values are imported one by one."""
    code = (
        "import sys\n"
        "from orchestrator.methods import METHODS\n"
        "from orchestrator.plan.forms import FORMS\n"
        "assert [*METHODS][-1] == 'diagonal' and 'svd' in METHODS and 'diagonal' in FORMS\n"
        "loaded = {name for name in sys.modules if name.startswith(('toy', 'torch'))}\n"
        "assert loaded == set() and 'orchestrator.methods.svd' not in sys.modules\n"
        "METHODS['diagonal']\n"
        "assert 'toy.method' in sys.modules and 'torch' not in sys.modules"
    )
    paths = os.pathsep.join(map(str, (ROOT, PLUGIN)))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_without_the_package_its_names_do_not_exist(result):
    """A recipe and a checkpoint that need it are refused with what is there."""
    for registry in REGISTRIES.values():
        registry.refresh()
    sys.path.remove(str(PLUGIN))
    try:
        with pytest.raises(UsageError, match="method is 'diagonal'; it must be one of asvd"):
            resolve(recipe_of(method="diagonal"))
        with pytest.raises(UsageError, match=r"forms: 'diagonal' is not installed .* dense, low"):
            result.plan.assignments[cut(result)[0]].stored_values(None)
        assert FORMS.get("diagonal") is MODULES.get("diagonal") is None
    finally:
        sys.path.insert(0, str(PLUGIN))
        for registry in REGISTRIES.values():
            registry.refresh()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {"diagonal": {"fits": True}}}, "diagonal: unknown option 'fits'.*fit"),
        ({"allocation": "uniform"}, "'uniform' divides ranks or entries.*keeps linears"),
        ({"method": "svd", "allocation": "whole-linears"}, "'whole-linears' divides linears"),
        ({"options": {"whole-linears": {"gain": "none"}}}, "whole-linears: gain is 'none'"),
        ({"method": "svd", "options": {"diagonal": {"fit": True}}}, "diagonal.fit has no effect"),
        ({"options": {"rescale": {"most": 2.0}}}, "rescale: unknown option 'most'.*largest"),
        ({"options": {"rescale": {"largest": 0.5}}}, "rescale: largest is 0.5"),
        ({"method": "svd", "options": {"rescale": {}}}, "rescale is for diagonals, and svd"),
        ({"storage": "pivoted"}, "storage is 'pivoted'"),
        ({"compensate": "input"}, "compensate is 'input', which fits factors"),
    ],
)
def test_its_settings_are_checked_as_any_other(toy, fields, message):
    """Before a file is read: unknown options, values, and parts that do not fit together."""
    with pytest.raises(UsageError, match=message):
        resolve(recipe_of(**{"method": "diagonal"} | fields))


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_built_in_file_is_in_its_table(kind):
    """Each file of methods, allocators, stages and forms that defines one has a line."""
    registry, folder = REGISTRIES[kind], {"allocators": "allocate", "forms": "plan/forms"}
    names = [name for name in registry if not registry.distribution(name)]
    objects = [registry[name] for name in names]
    classes = [each if isinstance(each, type) else type(each) for each in objects]
    listed = {sys.modules[each.__module__].__file__ for each in classes}
    base = {
        "methods": {"Method"},
        "allocators": {"Allocator", "GateAllocator", "StoppedGates"},
        "stages": {"Stage"},
        "forms": {"Form"},
    }
    found = {
        str(path)
        for path in (ROOT / "orchestrator" / folder.get(kind, kind)).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and path.name not in ("base.py", "stopped.py")
        and any(ast.unparse(each) in base[kind] for each in node.bases)
    }
    assert found <= listed
    if kind == "forms":
        assert [MODULES[name].form for name in MODULES if name in names] == names[1:]


@pytest.mark.ray
def test_workers_on_ray_need_the_package(toy, model, text, result, tmp_path, ray_address):
    """With it they write the same bytes; without it the run ends with one line that says so."""
    flags = ["--keep", 0.5, "--samples", 6, "--sequence-length", 48, "--workers", 2]
    flags += ["--method", "diagonal", "--option", "rescale.largest=100.0"]
    flags += ["--calibration", text, "--address", ray_address]
    done = command("compress", model, tmp_path / "none", *flags, packages=[PLUGIN])
    assert done.returncode == 1
    said = "orchestrator: error: a worker cannot start: ModuleNotFoundError: No module named 'toy'"
    assert f"{said}; install it on every node\n" in done.stderr
    variables = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, PLUGIN)))}
    job = {"runtime_env": {"env_vars": variables}}
    done = command(
        *("compress", model, tmp_path / "out", *flags),
        packages=[PLUGIN],
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job),
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (result.out / "model.safetensors").read_bytes()
