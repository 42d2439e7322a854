"""Work of a stage, as it is counted before its calls and after them, and events of progress."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from pipeline import run, write_llama, write_text

from orchestrator.progress.tally import Ahead, Tally
from orchestrator.runtime.calls import Call, Verify
from orchestrator.runtime.monitor import RunMonitor

TRAINED = {
    "method": "two-sided",
    "storage": "pivoted",
    "refine": "blocks",
    "train": "all",
    "options": {"refinement": {"epochs": 1}, "training": {"epochs": 2, "batches": 2, "every": 2}},
}
WALKED = {
    "method": "svd-llm",
    "compensate": "anchored",
    "refine": "in_order",
    "options": {"refinement": {"epochs": 2, "batches": 2}},
}
SCORED = {"method": "cap", "options": {"cap": {"iterations": 2, "samples": 2}}}


class SteppedClock:
    """Clock that is set by the test; seconds."""

    now = 0.0

    def __call__(self):
        return self.now


def test_first_calls_and_old_ones_lose_their_weight():
    """After calls of 9 s, 4 s and many of 1 s all are counted; the cost is that of the last."""
    clock, call = SteppedClock(), Call(0, Verify(()), "file")
    tally = Tally(Ahead(), clock=clock)
    costs = []
    for seconds in [9.0, 4.0] + 200 * [1.0]:
        tally.begun(call, "verify", 1.0)
        clock.now += seconds
        tally.over(call, succeeded=True)
        costs.append(tally.ended["verify"].cost)
    assert costs[:2] == [9.0, 4.0]
    assert all(earlier > later for earlier, later in pairwise(costs))
    assert costs[-1] == pytest.approx(1.0, abs=0.05)
    found = tally.ended["verify"]
    assert (found.units, found.seconds) == (202, 213.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=4)


@pytest.fixture
def counted(monkeypatch):
    """Expected and counted units by stage and kind, of all runs in this test."""
    expected, stages = defaultdict(Counter), defaultdict(list)
    make, look = RunMonitor.tally, Tally.look

    def tally(self, ahead=None):
        stage, found = self.within[-1], make(self, ahead)
        found.is_first = stage not in stages
        found.stage = stage
        stages[stage].append(found)
        return found

    def looked(self, to_do, *arguments, **options):
        if self.is_first:
            expected[self.stage].update(to_do)
            expected[self.stage].update(self.ahead.to_do)
            self.is_first = False
        return look(self, to_do, *arguments, **options)

    monkeypatch.setattr(RunMonitor, "tally", tally)
    monkeypatch.setattr(Tally, "look", looked)

    def result():
        ended = defaultdict(Counter)
        for stage, tallies in stages.items():
            for each in tallies:
                ended[stage].update({kind: m.units for kind, m in each.ended.items()})
        return {stage: +found for stage, found in expected.items()}, dict(ended)

    return result


@pytest.mark.parametrize("fields", [TRAINED, WALKED, SCORED], ids=["trained", "walked", "scored"])
def test_the_work_of_a_stage_is_known_at_its_beginning(fields, counted, llama, tmp_path):
    """All units that a stage's calls do are expected before its first call, kind by kind."""
    run(llama, tmp_path / "out", write_text(tmp_path / "text.txt"), **fields)
    expected, ended = counted()
    for found in (expected, ended):
        # rounds of trials open all shards, and how many rounds there are is not counted
        found.get("score", {}).pop("open", None)
    assert expected == ended
