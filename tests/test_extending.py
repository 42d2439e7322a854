"""Another package adds a method, a kind of result, an allocator, a stage and a form.

The package is `support/plugin`, installed by its entry points alone: no line of orchestrator names
it.
"""

import ast
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pipeline import contents, run, write_llama, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import orchestrator
import orchestrator.hf
from orchestrator import api
from orchestrator.catalogue import REGISTRIES
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.recipe.recipe import Recipe, make_recipe

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "support" / "plugin"
ADDED = {
    "methods": "diagonal",
    "allocators": "whole-linears",
    "stages": "rescale",
    "forms": "diagonal",
}
SMALL = {"keep": 0.5, "samples": 6, "sequence_length": 48}
RESCALED = {"rescale": {"largest": 100.0}}


@contextmanager
def on_path(directory):
    """The packages in a directory are installed in this process meanwhile."""
    sys.path.insert(0, str(directory))
    for registry in REGISTRIES.values():
        registry.refresh()
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for registry in REGISTRIES.values():
            registry.refresh()


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


def recipe_of(**given):
    return Recipe(**{"model": "m", "out": "o", "keep": 0.5} | given)


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


def test_it_is_planned(toy, model):
    """The forecast has the stage, and counts its memory and its files; options are checked."""
    fields = {"model": str(model), "out": "planned", "method": "diagonal", **SMALL}
    found = api.plan(make_recipe(fields | {"options": RESCALED}))
    assert [stage.name for stage in found.stages] == ["calibrate", "rescale", "write"]
    assert found.run["rescale"].parts["diagonals"] > 0
    assert not found.infeasible
    without = api.plan(make_recipe(fields))
    assert [stage.name for stage in without.stages] == ["calibrate", "write"]


def test_the_budget_decides_which_linears_are_cut(result):
    """Those that stay dense lose the most energy per value; the rest of the budget holds none."""
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
