"""Runs whose gates are polarised at one size, and their gains."""

import pytest
import torch
from pipeline import run
from safetensors.torch import load_file

from orchestrator import load, retarget, verify
from orchestrator.errors import InfeasibleError, UsageError

FAST = {"rate": 0.3, "steps": 12, "every": 4, "batch": 2, "target": 0.4}
TOKENS = torch.arange(2, 34)[None] * 5 % 96


def polarised(model, out, text, *, options=None, **fields):
    options = {"soco": FAST | (options or {})}
    fields = {"method": "two-sided", "keep": 0.4} | fields
    return run(model, out, text, allocation="soco", options=options, **fields)


@pytest.fixture(scope="module")
def first(llama3, text, tmp_path_factory):
    """Run in one process and one shard."""
    return polarised(llama3, tmp_path_factory.mktemp("first") / "out", text, shards=1)


def scores_of(run_dir):
    """Arrays of the scores of all linears."""
    found = {}
    for path in run_dir.rglob("scores.safetensors"):
        found |= load_file(path)
    return found


def test_gates_part_and_amplify(first):
    """All steps are taken, gates have parted on both sides of a half, and some are above 1."""
    report = first.report["learn"]
    assert (report["stop"], report["steps"], report["gains"]) == ("end", 12, True)
    assert "2502.15092" in first.report["reconstructions"]["allocation soco"]
    sizes = [each["kept"] for each in report["snapshots"]]
    assert sizes[0] == 1 > report["kept"] == sizes[-1]
    assert first.plan.stored_values <= first.plan.budget_values
    gains = torch.cat([t for n, t in scores_of(first.run_dir).items() if n.endswith(".gains")])
    assert 0 <= float(gains.min()) < 0.5
    assert 1 < float(gains.max()) < 2


def test_gains_are_in_the_left_factors_at_the_target_and_not_above(first, tmp_path):
    """Left factors at the target are those of the decomposition times the gates, column by column;
    a larger size, made without text and steps, has them as they were."""
    events = []
    cut = retarget(
        first.run_dir, tmp_path / "cut", keep=0.75, executor="local", on_event=events.append
    )
    assert {e["stage"] for e in events if e["event"] == "unit"} == {"verify", "write"}
    assert not cut.report["learn"]["gains"]
    arrays, seen = scores_of(first.run_dir), 0
    stored = {path: load_file(path / "model.safetensors") for path in (first.out, cut.out)}
    for name, small in first.plan.assignments.items():
        large = cut.plan.assignments[name]
        if small.form == large.form == "low_rank":
            assert small.rank <= large.rank
            gained_OR = stored[first.out][f"{name}.weight"]
            plain_OR = stored[cut.out][f"{name}.weight"][:, : small.rank]
            gains_R = arrays[f"{name}.gains"][: small.rank]
            torch.testing.assert_close(gained_OR, plain_OR * gains_R, rtol=1e-5, atol=1e-6)
            down = f"{name}.down.weight"
            assert torch.equal(stored[first.out][down], stored[cut.out][down][: small.rank])
            seen += 1
    assert seen > 2
    assert bool(load(first.out)(input_ids=TOKENS).logits.isfinite().all())


def test_pivoted_factors_have_gains_too(llama2, text, tmp_path):
    """They are pivoted after the gains, and anew for a size without; the files are sound, and sizes
    below are refused."""
    found = polarised(llama2, tmp_path / "out", text, storage="pivoted")
    assert found.report["learn"]["gains"]
    assert verify(found.out, against=llama2)["problems"] == []
    # above the target by less than a rank: the plan stays, the gains do not
    plain = retarget(found.run_dir, tmp_path / "plain", keep=0.40001, executor="local")
    assert plain.plan.assignments == found.plan.assignments
    assert not plain.report["learn"]["gains"]
    stored = [load_file(each.out / "model.safetensors") for each in (found, plain)]
    assert any(not torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    with pytest.raises(UsageError, match=r"keep: 0\.3 is below 0\.4, the size that soco\.target"):
        retarget(found.run_dir, tmp_path / "cut", keep=0.3, executor="local")
    with pytest.raises(UsageError, match=r"drives gates to a fraction of the values"):
        retarget(found.run_dir, tmp_path / "cut", keep_flops=0.5, executor="local")


def test_a_size_that_the_steps_did_not_reach_is_refused(llama2, text, tmp_path):
    """No gate has parted after two steps; their order is taken if that is asked for."""
    with pytest.raises(InfeasibleError, match=r"2 steps keep 1\.0000, and soco was to reach 0\.4"):
        polarised(llama2, tmp_path / "out", text, options={"steps": 2})
    options = {"soco": {"below_target": "allow"}}
    run_dir = tmp_path / "out.run"
    cut = retarget(run_dir, tmp_path / "cut", executor="local", options=options)
    assert cut.report["learn"]["extrapolated"]
