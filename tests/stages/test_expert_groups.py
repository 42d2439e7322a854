"""Experts in groups: results are those of one pass over all, to the bit."""

import json
import shutil

import pytest
from pipeline import add_tokenizer, contents, run, write_text

from orchestrator.plan.experts import expert_groups
from orchestrator.plan.linear import Linear

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


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_of_experts_change_no_bit(groups, case, tmp_path):
    """Units of blocks and output files are equal; some experts are rare, and need the sums over
    all experts of their block. The units of groups are gone at the end."""
    model, text, fields, expected = case
    counts = expected.report["experts"]["tokens"].values()
    assert min(counts) < 24 < max(counts)
    seen = []
    follow = lambda event: seen.append(event.get("unit"))  # noqa: E731
    result = run(model, tmp_path / "out", text, expert_groups=groups, on_event=follow, **fields)
    same(result, expected)
    assert f"block 2, experts 1 of {groups}" in seen


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
