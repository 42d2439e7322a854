"""Broken entries of packages and stages out of order: one clear line each."""

import pytest
from plugins import PLUGIN, on_path, recipe_of

from orchestrator import verify
from orchestrator.catalogue import REGISTRIES, catalogue
from orchestrator.errors import UsageError
from orchestrator.hf.bootstrap import bootstrap_source
from orchestrator.methods import METHODS
from orchestrator.models.evaluation import verification
from orchestrator.resolve import resolve
from orchestrator.stages import stage_classes


@pytest.fixture(scope="module")
def toy():
    with on_path(PLUGIN):
        yield


def install(directory, group, entry, *, name="other", source=""):
    """Write a package with one entry point, and a module `NAME_code`."""
    metadata = directory / f"{name}-2.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text(f"[orchestrator.{group}]\n{entry}\n")
    (directory / f"{name}_code.py").write_text(source)


@pytest.mark.parametrize(
    ("number", "group", "entry", "source", "message"),
    [
        (
            1,
            "methods",
            "svd = other1_code:Svd",
            "",
            "'svd' is given by orchestrator itself and by other1 2.0",
        ),
        (
            2,
            "methods",
            "broken = other2_code:Broken",
            "import missing_module",
            "other2 2.0: entry point 'broken' .*ModuleNotFoundError: No module named 'missing_mod",
        ),
        (3, "methods", "none = other3_code:None_", "", "'none' .*AttributeError"),
        (
            4,
            "allocators",
            "wrong = other4_code:Wrong",
            "class Wrong: pass",
            "it must be a class below Allocator",
        ),
        (
            5,
            "methods",
            "renamed = other5_code:Renamed",
            "from toy.method import Diagonal as Renamed",
            "its `name` is 'diagonal'; give the entry point that name",
        ),
        (
            6,
            "forms",
            "flat = other6_code:FLAT",
            "FLAT = 3",
            "is 3; it must be an object of a class below Form",
        ),
    ],
)
def test_a_broken_entry_is_one_clear_line(toy, tmp_path, number, group, entry, source, message):
    """It names package and entry; everything else works, and the list shows it."""
    install(tmp_path, group, entry, name=f"other{number}", source=source)
    name = entry.partition(" ")[0]
    with on_path(tmp_path):
        with pytest.raises(UsageError, match=message) as caught:
            REGISTRIES[group][name]
        assert "\n" not in str(caught.value)
        (shown,) = (each for each in catalogue()[group] if each.name == name)
        assert shown.error == str(caught.value)
        assert METHODS["svd-llm"].name == "svd-llm"


SCORED = """
from orchestrator.allocate.base import Scoring
from orchestrator.allocate.uniform import Uniform

class Scored(Uniform):
    scoring = Scoring.MASKS
"""


def test_an_allocator_whose_losses_no_stage_takes_is_refused(tmp_path):
    """Without the methods that the scoring stage calls it ends before any work."""
    install(tmp_path, "allocators", "scored = scored_code:Scored", name="scored", source=SCORED)
    with (
        on_path(tmp_path),
        pytest.raises(UsageError, match=r"asks for masks without .*MaskAllocator"),
    ):
        resolve(recipe_of(allocation="scored"))


STAGE = """
from dataclasses import dataclass
from orchestrator.stages.base import Stage

@dataclass(frozen=True, slots=True, kw_only=True)
class After(Stage):
    name = {name!r}
    follows = {follows!r}
    def job(self, planned, earlier): ...
    def cost(self, setting): ...
"""


@pytest.mark.parametrize(
    ("follows", "order"),
    [
        ("", "refit pivot rescale walk refine sweep train a b"),
        ("train", "refit pivot rescale walk refine sweep train a b"),
        ("refit", "refit a b pivot rescale walk refine sweep train"),
        ("pivot", "refit pivot a b rescale walk refine sweep train"),
        ("rescale", "refit pivot rescale a b walk refine sweep train"),
    ],
)
def test_a_stage_comes_where_it_says(toy, tmp_path, follows, order):
    """At the end, or after the stage that it names, even one of another package; else by name."""
    for stage in ("b", "a"):
        name = f"stage_{stage}_{follows}"
        source = STAGE.format(name=stage, follows=follows)
        install(tmp_path, "stages", f"{stage} = {name}_code:After", name=name, source=source)
    recipe = recipe_of(method="diagonal", options={"rescale": {}, "a": {}, "b": {}})
    with on_path(tmp_path):
        assert [stage.name for stage in stage_classes(recipe)] == order.split()
        asked = [name for name in order.split() if name in ("rescale", "a", "b")]
        assert [stage.name for stage in resolve(recipe).stages] == asked


def test_a_stage_has_no_name_of_a_part_of_every_run(toy, tmp_path):
    """Events and forecasts name stages, so a second `write` is refused if it is asked for."""
    source = STAGE.format(name="write", follows="")
    install(tmp_path, "stages", "write = taken_code:After", name="taken", source=source)
    with on_path(tmp_path):
        with pytest.raises(UsageError, match=r"taken 2.0: stage .write. has a name that is taken"):
            resolve(recipe_of(options={"write": {}}))
        assert resolve(recipe_of()).stage_names == ("calibrate", "write")


def test_verify_imports_only_stages_that_the_report_has(monkeypatch, tmp_path):
    """A broken stage that a checkpoint does not name is not asked whether it changes errors."""
    install(tmp_path, "stages", "absent = absent_code:Absent", name="absent", source="1 / 0")
    monkeypatch.setattr(verification, "verify", lambda out, **given: given["changes_errors"])
    with on_path(tmp_path):
        changes_errors = verify(tmp_path)
        assert not changes_errors({"linears": {}, "pivot": {}})
        assert changes_errors({"pivot": {}, "refine": {}})
        with pytest.raises(UsageError, match=r"absent 2\.0: .*ZeroDivisionError"):
            changes_errors({"absent": {}})


def test_a_stage_after_one_that_is_missing(toy, tmp_path):
    """The message names the stages that are part of the run."""
    source = STAGE.format(name="after", follows="never")
    install(tmp_path, "stages", "after = lost_code:After", name="lost", source=source)
    with on_path(tmp_path):
        message = "lost 2.0: stage 'after' follows 'never', .* refit, pivot"
        with pytest.raises(UsageError, match=message):
            resolve(recipe_of(options={"after": {}}))
        assert resolve(recipe_of()).stages == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("import numpy\n", "imports numpy; it may import torch"),
        ("from toy.sizes import DiagonalForm\n", "imports toy.sizes; it may import torch"),
        ("from orchestrator.api import load\n", "imports orchestrator.api; it may import torch"),
        ("class LowRankLinear:\n    pass\n", "defines LowRankLinear, as another file"),
    ],
)
def test_a_form_that_cannot_be_shipped_is_refused(toy, tmp_path, change, message):
    """Its file becomes part of the checkpoint, so it must stand alone."""
    name = f"form{abs(hash(change))}"
    linear = (PLUGIN / "toy" / "linear.py").read_text().replace('"diagonal"\n', '"other"\n', 1)
    sizes = (PLUGIN / "toy" / "sizes.py").read_text().replace('"diagonal"', '"other"')
    sizes = sizes.replace("toy.linear:", f"{name}_module:")
    install(tmp_path, "forms", f"other = {name}_code:DiagonalForm", name=name, source=sizes)
    before, classes, after = linear.partition("class DiagonalLinear")
    (tmp_path / f"{name}_module.py").write_text(
        f"{before}{change}{classes}{after}"
        if change.startswith("class")
        else linear.replace("import torch\n", f"import torch\n{change}", 1)
    )
    with on_path(tmp_path), pytest.raises(UsageError, match=f"{name} 2.0: .*{message}"):
        bootstrap_source("LlamaForCausalLM", {"other"})
