"""Runs with gains of their own for several budgets."""

import pytest
import torch
from pipeline import run
from safetensors.torch import load_file

from orchestrator import retarget

FAST = {"rate": 0.3, "steps": 12, "every": 2, "batch": 2, "budgets": "0.4 0.6"}


def polarised(model, out, text, **fields):
    fields = {"method": "two-sided", "keep": 0.4, "options": {"soco": FAST}} | fields
    return run(model, out, text, allocation="soco", **fields)


@pytest.fixture(scope="module")
def first(llama3, text, tmp_path_factory):
    """Run in one process and one shard."""
    return polarised(llama3, tmp_path_factory.mktemp("first") / "out", text, shards=1)


def arrays_of(run_dir):
    """Arrays of all units of scores and of gains, those of each unit as one."""
    return [load_file(path) for path in run_dir.rglob("scores.safetensors")]


def cut(first, out, keep):
    """Another size, with the stages that made units, and its left factors."""
    events = []
    found = retarget(first.run_dir, out, keep=keep, executor="local", on_event=events.append)
    return found, {e["stage"] for e in events if e["event"] == "unit"}


def lefts(found):
    stored = load_file(found.out / "model.safetensors")
    ranks = {n: a.rank for n, a in found.plan.assignments.items() if a.form == "low_rank"}
    return {name: stored[f"{name}.weight"] for name, rank in ranks.items() if rank}


def test_each_budget_has_gains_of_its_own(first):
    """Directions that its plan keeps have one each, trained for the steps of the third phase; the
    smallest budget is the target."""
    report = first.report["learn"]
    assert (report["steps"], report["gains"], report["gains_of"]) == (12, True, 0.4)
    small, large = report["budgets"]["0.4"], report["budgets"]["0.6"]
    assert small["kept"] <= 0.4 < large["kept"] <= 0.6
    assert [each["step"] for each in large["snapshots"]] == [0, 2, 3]
    assert small["gains"] == sum(each.rank for each in first.plan.assignments.values())
    of_budgets = [
        sum(map(len, found.values()))
        for found in arrays_of(first.run_dir)
        if all(name.endswith(".gains") for name in found)
    ]
    assert sum(of_budgets) == small["gains"] + large["gains"]


def test_left_factors_are_multiplied_by_the_gains_of_the_budget(first, tmp_path):
    """Factors of the decomposition, which sizes above all budgets store, times the gains of the
    unit whose directions are those of the plan of the nearest budget."""
    plain, _ = cut(first, tmp_path / "plain", 0.8)
    assert not plain.report["learn"]["gains"]
    at_budget, _ = cut(first, tmp_path / "budget", 0.6)
    between, _ = cut(first, tmp_path / "between", 0.5)
    assert between.report["learn"]["gains_of"] == 0.6
    units, seen = arrays_of(first.run_dir), 0
    stored_plain, stored_between = lefts(plain), lefts(between)
    for name in stored_plain.keys() & stored_between.keys():
        rank, used = at_budget.plan.assignments[name].rank, stored_between[name].shape[1]
        if rank == first.plan.assignments[name].rank:
            continue  # the unit of the other budget has as many
        (gains_K,) = (
            found[f"{name}.gains"]
            for found in units
            if f"{name}.order" not in found and len(found.get(f"{name}.gains", ())) == rank
        )
        assert used <= rank
        expected_OR = stored_plain[name][:, :used] * gains_K[:used]
        torch.testing.assert_close(stored_between[name], expected_OR, rtol=1e-5, atol=1e-6)
        assert not torch.equal(gains_K, torch.ones_like(gains_K))
        seen += 1
    assert seen > 2
