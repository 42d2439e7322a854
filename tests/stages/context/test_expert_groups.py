"""Experts in groups: results are those of one pass over all, to the bit."""

import json
import math
import shutil

import pytest
from pipeline import add_tokenizer, contents, run, write_text

from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import Machine, nominal_rates
from orchestrator.forecast.room import USABLE
from orchestrator.forecast.surveyed import surveyed_shapes
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.experts import expert_groups
from orchestrator.plan.linear import Linear
from orchestrator.recipe.recipe import make_recipe
from orchestrator.stages import admission

SMALL = {"samples": 2, "sequence_length": 24, "shards": 2}
CASES = {
    "svd-llm": ("qwen3_moe", {}),
    # its first block is dense
    "two-sided": ("deepseek_v3", {"options": {"two-sided": {"draws": 2}}}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, moe_checkpoint, tmp_path_factory):
    """Model, text, fields of the recipe and the run with one group."""
    family, fields = CASES[request.param]
    root = tmp_path_factory.mktemp("groups")
    model = add_tokenizer(shutil.copytree(moe_checkpoint(family), root / "dense"))
    text = write_text(root / "text.txt")
    fields = {"method": request.param, **SMALL, **fields}
    return model, text, fields, run(model, root / "out", text, expert_groups=1, **fields)


def units(run_dir):
    """Files of all units in the order of their manifests, and facts without timings."""
    found = {}
    for manifest in run_dir.glob("units/*/*/manifest.json"):
        content = json.loads(manifest.read_bytes())
        content["facts"].pop("timings", None)
        files = {name: (manifest.parent / name).read_bytes() for name in content["files"]}
        found[manifest.parent.name] = [*files.items()], content["facts"]
    return found


def same(found, expected):
    """Compare units and output files of two runs."""
    assert units(found.run_dir) == units(expected.run_dir)
    one, other = contents(found.out), contents(expected.out)
    reports = [each.pop("orchestrator_report.json") for each in (one, other)]
    assert one == other
    assert reports[0]["linears"] == reports[1]["linears"]
    assert reports[0]["experts"] == reports[1]["experts"]


def room_for(model, text, fields):
    """Memory of a host in which these fields fit, and not a byte more."""
    asked = {"model": str(model), "out": "o", "keep": 0.5, "calibration": str(text), **fields}
    machine = Machine("", None, (nominal_rates(None),), is_gpu=False)
    resources = Resources(workers=1, machine=machine, memory_bytes=None)
    shapes = surveyed_shapes(LazyModel.open(model).survey())
    held = forecast(shapes, make_recipe(asked), resources).stages[0].device.total
    return math.ceil(held / USABLE)


@pytest.mark.parametrize("groups", ["auto", 3])
def test_groups_of_experts_change_no_bit(groups, case, tmp_path, monkeypatch):
    """Units of blocks and output files are equal; some experts are rare, and need the sums over
    all experts of their block. The units of groups are gone at the end. By default there are the
    fewest groups that fit in memory."""
    model, text, fields, expected = case
    counts = expected.report["experts"]["tokens"].values()
    assert min(counts) < 24 < max(counts)
    if groups == "auto":
        # a run without a number of shards has one block in each
        fields = {name: each for name, each in fields.items() if name != "shards"}
        room = room_for(model, text, {**fields, "expert_groups": 2})
        monkeypatch.setattr(admission, "host_bytes", lambda: room)
    seen = []
    follow = lambda event: seen.append(event.get("unit"))  # noqa: E731
    result = run(model, tmp_path / "out", text, expert_groups=groups, on_event=follow, **fields)
    same(result, expected)
    assert f"block 2, experts 1 of {2 if groups == 'auto' else groups}" in seen


def test_a_run_resumes_between_groups(case, tmp_path):
    """A run that stops after the first group's last block goes on with the second group."""
    model, text, fields, expected = case
    first, seen = "experts 1 of 2", []

    def stop(event):
        if first in str(event.get("unit")) and event["done"] == event["total"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", text, expert_groups=2, on_event=stop, **fields)

    def follow(event):
        seen.append(str(event.get("unit")))

    result = run(model, tmp_path / "out", text, expert_groups=2, on_event=follow, **fields)
    same(result, expected)
    assert any("experts 2 of 2" in unit for unit in seen)
    assert not any(first in unit for unit in seen)


def test_groups_are_contiguous_and_hold_every_linear_once():
    """Sizes differ by one expert at most; linears that are no expert's go with the first group."""

    def linear(name):
        about = {"block": 0, "site": name, "has_bias": False, "out_features": 4, "in_features": 4}
        return Linear(name=name, role=name, **about)

    linears = [linear("0.q"), linear("0.mlp.shared.up")]
    linears += [linear(f"0.mlp.experts.{e}.{part}") for e in range(7) for part in ("up", "down")]
    groups = expert_groups(linears, {"0.mlp.experts"}, 3)
    assert [each for group in groups for each in group] == linears
    assert [len(group) for group in groups] == [2 + 2 * 3, 2 * 2, 2 * 2]
    assert expert_groups(linears, {"0.mlp.experts"}, 1) == (tuple(linears),)
