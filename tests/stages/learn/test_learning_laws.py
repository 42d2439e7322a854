"""Laws of every allocation that learns: any size from one run, any workers, stopped and resumed."""

from typing import NamedTuple

import pytest
from pipeline import contents, run
from pools import several

from orchestrator import retarget
from orchestrator.errors import StoppedError


class LearningCase(NamedTuple):
    """Settings of a learning of a few steps, its size, and another size of the same run."""

    allocation: str
    method: str
    options: dict[str, object]
    keep: float
    other: float


PULLED = {"rate": 0.2, "penalty": 0.002, "growth": 1.5, "growth_every": 1, "steps": 30, "stop": 0.5}
PUBLISHED = {"tail": "full", "penalty_by": "count", "adapters": 3}
POLARISED = {"rate": 0.3, "steps": 12}
CASES = {
    "learned": LearningCase("learned", "two-sided", PULLED, 0.8, 0.55),
    "learned as published": LearningCase("learned", "svd", PULLED | PUBLISHED, 0.9, 0.55),
    "path": LearningCase("path", "two-sided", {"stop": 0.5, "step": 0.02}, 0.7, 0.55),
    "soco": LearningCase("soco", "two-sided", POLARISED | {"target": 0.4}, 0.7, 0.4),
    "soco with budgets": LearningCase(
        "soco", "two-sided", POLARISED | {"budgets": "0.4 0.6"}, 0.6, 0.5
    ),
}
ENDS_BY_SIZE = ["learned", "learned as published", "path"]


def learned(case, model, out, text, **fields):
    fields = {"method": case.method, "keep": case.keep} | fields
    options = {case.allocation: {"batch": 2, "every": 2} | case.options}
    return run(model, out, text, allocation=case.allocation, options=options, **fields)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def first(case, llama3, text, tmp_path_factory):
    """Run in one process and one shard."""
    return learned(case, llama3, tmp_path_factory.mktemp("first") / "out", text, shards=1)


@pytest.mark.parametrize("case", ENDS_BY_SIZE, indirect=True)
def test_gates_close_until_the_size_is_reached(case, first):
    """The size never grows from snapshot to snapshot, and the last one alone is small enough."""
    found = first.report["learn"]
    sizes = [each["kept"] for each in found["snapshots"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 1
    assert sizes[-1] == found["kept"] <= case.options["stop"] < sizes[-2]
    assert found["stop"] == "size"
    assert found["steps"] == 2 * (len(sizes) - 1)
    assert 0 < found["open"] < found["gates"]
    assert not found["extrapolated"]


def test_another_size_needs_no_text_and_no_learning(case, first, llama3, text, tmp_path):
    """The bytes of a run of that size; no unit is made but the files, and ranks are no larger."""
    events = []
    cut = retarget(
        first.run_dir, tmp_path / "cut", keep=case.other, executor="local", on_event=events.append
    )
    assert {e["stage"] for e in events if e["event"] == "unit"} == {"verify", "write"}
    alone = learned(case, llama3, tmp_path / "alone", text, keep=case.other)
    assert contents(cut.out) == contents(alone.out)
    for name, larger in first.plan.assignments.items():
        smaller = cut.plan.assignments[name]
        assert larger.form == "dense" or 0 < smaller.rank <= larger.rank


def test_workers_and_losses_change_no_bit(case, first, llama3, text, tmp_path, monkeypatch):
    """Three workers that are lost one after the other, but for the last one."""
    several(monkeypatch, size=3, losses=(9, 20, 21, 40), replaces=False)
    events = []
    found = learned(case, llama3, tmp_path / "out", text, shards=2, on_event=events.append)
    assert sum(e["event"] == "lost" for e in events) >= 2
    assert contents(found.out) == contents(first.out)


def test_a_stopped_learning_goes_on_from_its_snapshot(case, first, llama3, text, tmp_path):
    """It is stopped in its third step and, of budgets, in the second one of each one's gains. No
    step before the snapshot is repeated, the bits are those of a run that was not stopped, and no
    state is left at the end."""
    budgets = first.report["learn"].get("budgets", ())
    stops = [3, *[2 for _ in budgets]]
    steps = []

    def on_event(event):
        if event["event"] == "unit" and event["stage"] == "learn":
            steps.append(event["done"])
            if stops and steps[-2:] == [stops[0] - 1, stops[0]]:
                del stops[0]
                steps.append("stop")
                raise StoppedError("enough")

    for _ in range(1 + len(budgets)):
        with pytest.raises(StoppedError):
            learned(case, llama3, tmp_path / "out", text, on_event=on_event)
    learned(case, llama3, tmp_path / "out", text, on_event=on_event)
    assert steps[:5] == [1, 2, 3, "stop", 3]
    assert contents(tmp_path / "out") == contents(first.out)
    assert not list((tmp_path / "out.run").rglob("state.safetensors"))
