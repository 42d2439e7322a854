"""What a lost worker means, and the dispatch loop with a pool that loses workers as told."""

import random

import pytest

from orchestrator.cluster.policy import FailurePolicy
from orchestrator.cluster.pool import Outcome, dispatch
from orchestrator.cluster.schedule import Bag, Pass, cut_blocks
from orchestrator.errors import InputError, WorkerError
from orchestrator.store.chunks import MissingChunk


class ScriptedPool:
    """Workers that do nothing; what becomes of a call is looked up by its label, once an entry.

    A block is only finished by a worker that has seen every chunk of its shard once, in order.
    """

    def __init__(self, workers, script=()):
        self._workers = list(range(workers))
        self._script = list(script)
        self._running = []
        self._fed = {}
        self.started = []
        self.records = {}

    def workers(self):
        return self._workers

    def start(self, call, record):
        assert call.worker in self._workers
        self.started.append(call.label)
        self.records[call.label] = record
        self._running.append(call)

    def wait(self, seconds):
        call = self._running.pop(0)
        for entry in self._script:
            label, becomes = entry
            if label == call.label:
                self._script.remove(entry)
                return [Outcome(call, **becomes)]
        if call.method == "open":
            self._fed[call.worker] = []
        elif call.method == "step":
            self._fed[call.worker].append(call.arguments[0])
        elif call.method == "finish":
            assert self._fed[call.worker] == [0, 1, 2]
        return [Outcome(call, value=call.label, record=f"{call.label} gave this")]

    def replace(self, worker):
        self._workers.remove(worker)
        self._workers.append(max([*self._workers, worker]) + 1)

    def describe(self):
        return "a script"


LOST = {"lost": "the node went away"}


@pytest.fixture
def run():
    """Dispatches a schedule on a scripted pool; gives the pool, what succeeded and the events."""

    def run(schedule, workers=2, script=(), policy=None, awaited=lambda chunk: False):
        pool, done, events = ScriptedPool(workers, script), [], []
        dispatch(
            pool,
            schedule,
            policy or FailurePolicy(),
            on_success=lambda call, value: done.append(value),
            is_awaited=awaited,
            on_event=events.append,
        )
        return pool, done, events

    return run


def bag(count=6):
    return Bag("write", [(f"file {n}", (n,)) for n in range(count)])


def four_blocks(chunks=3):
    cut = cut_blocks(4, 2)
    return Pass(cut, todo=range(4), num_chunks=chunks, present=[set() for _ in cut])


def test_losses_are_counted_and_forgiven():
    """Different units may lose workers, each of them twice."""
    policy = FailurePolicy()
    for unit in "abc":
        policy.after_loss(unit, "gone")
        policy.after_loss(unit, "gone")
    assert policy.losses == 6


def test_a_unit_that_takes_three_workers_down_ends_the_run():
    """The third loss of one unit is taken to be its own doing, and is said with its last reason."""
    policy = FailurePolicy()
    policy.after_loss("block 7, finish", "out of memory")
    policy.after_loss("block 7, finish", "out of memory")
    with pytest.raises(WorkerError, match=r"^block 7, finish: lost its worker 3 times.*memory"):
        policy.after_loss("block 7, finish", "out of memory")


def test_fifty_losses_end_a_run():
    """However they spread over the units, the fiftieth loss is one too many."""
    policy = FailurePolicy()
    for n in range(49):
        policy.after_loss(f"block {n}", "gone")
    with pytest.raises(WorkerError, match="50 workers lost in one run"):
        policy.after_loss("block 49", "gone")


def test_an_input_that_vanishes_again_and_again_ends_the_run():
    """Making it a third time would not keep it either."""
    policy = FailurePolicy()
    policy.after_missing("blocks 2-3, chunk 1")
    policy.after_missing("blocks 2-3, chunk 1")
    with pytest.raises(WorkerError, match="do all nodes share the run directory"):
        policy.after_missing("blocks 2-3, chunk 1")
    assert policy.losses == 0


def test_a_bag_survives_lost_workers(run):
    """Every unit is done once, whoever was lost over it, and every loss is told."""
    script = [("file 1", LOST), ("file 1", LOST), ("file 4", LOST)]
    pool, done, events = run(bag(), script=script)
    assert sorted(done) == [f"file {n}" for n in range(6)]
    assert [event["unit"] for event in events] == ["file 1", "file 1", "file 4"]
    assert {event["event"] for event in events} == {"lost"}
    assert pool.workers() == [3, 4] or sorted(pool.workers())[-1] == 4
    assert len(pool.started) == 6 + 3


def test_a_lost_worker_in_a_pass_costs_its_shard_only(run):
    """The shard is opened and fed again; shards that are done or held by others go on."""
    pool, done, _ = run(four_blocks(), script=[("blocks 2-3, chunk 2", LOST)])
    assert sorted(label for label in done if "finish" in label) == [
        f"block {block}, finish" for block in range(4)
    ]
    assert pool.started.count("blocks 0-1, open") == 1
    assert pool.started.count("blocks 2-3, open") == 2
    assert pool.started.count("blocks 2-3, chunk 0") == 2


def test_the_last_worker_may_be_lost_too(run):
    """One worker, lost in every kind of call, and its successors end the pass."""
    kinds = ["open", "chunk 0", "chunk 1", "chunk 2"]
    script = [(f"blocks {blocks}, {kind}", LOST) for blocks in ("0-1", "2-3") for kind in kinds]
    script += [(f"block {block}, finish", LOST) for block in range(4)]
    _, done, events = run(four_blocks(), workers=1, script=script)
    assert sum("finish" in label for label in done) == 4
    assert len(events) == len(script)


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_losses_and_missing_chunks_ends_well(seed, run):
    """Every block is finished, whatever is lost or missing on the way, and in whatever call."""
    rng = random.Random(seed)
    cut = cut_blocks(8, 4)
    schedule = Pass(cut, todo=range(8), num_chunks=3, present=[set() for _ in cut])
    pool, _, _ = run(schedule, workers=3)
    script = [(label, LOST) for label in rng.sample(pool.started, 6) for _ in range(2)]
    for boundary, chunk in rng.sample([(b, c) for b in (2, 4, 6) for c in range(3)], k=4):
        label = f"blocks {boundary}-{boundary + 1}, chunk {chunk}"
        script.append((label, {"error": MissingChunk(boundary, chunk)}))
    rng.shuffle(script)
    schedule = Pass(cut, todo=range(8), num_chunks=3, present=[set() for _ in cut])
    policy = FailurePolicy(a_unit=9)
    _, done, _ = run(schedule, workers=rng.choice([1, 2, 3]), script=script, policy=policy)
    assert sorted(label for label in done if "finish" in label) == [
        f"block {block}, finish" for block in range(8)
    ]


def test_a_poisonous_unit_is_named(run):
    """The loop ends with the policy's words after the third worker."""
    with pytest.raises(WorkerError, match=r"^block 1, finish: lost its worker 3 times"):
        run(four_blocks(), script=[("block 1, finish", LOST)] * 3)


def test_a_missing_chunk_is_made_again(run):
    """The worker that emitted it is not needed: whoever is free opens that shard again."""
    missing = {"error": MissingChunk(2, 1)}
    pool, done, events = run(four_blocks(), script=[("blocks 2-3, chunk 1", missing)])
    assert sum("finish" in label for label in done) == 4
    assert events == [{"event": "missing", "unit": "blocks 2-3, chunk 1"}]
    assert pool.started.count("blocks 0-1, chunk 1") == 2
    assert pool.started.count("blocks 0-1, chunk 0") == 1


def test_a_chunk_that_never_lasts_ends_the_run(run):
    """Without end it would be made and missed again."""
    missing = ("blocks 2-3, chunk 1", {"error": MissingChunk(2, 1)})
    with pytest.raises(WorkerError, match="damaged again"):
        run(four_blocks(), script=[missing] * 9)


def test_an_error_of_ours_ends_the_run_as_itself(run):
    """Bad input is bad on every worker; it is not tried again."""
    error = InputError("model.layers.2: 3 weights are not finite")
    with pytest.raises(InputError) as raised:
        run(bag(), script=[("file 2", {"error": error})])
    assert raised.value is error


def test_an_error_of_others_is_given_the_unit_s_name(run):
    """A fault in the code is no loss: it ends the run, with the unit and the error before it."""
    error = ZeroDivisionError("division by zero")
    with pytest.raises(
        WorkerError, match=r"^file 2: ZeroDivisionError: division by zero"
    ) as raised:
        run(bag(), script=[("file 2", {"error": error})])
    assert raised.value.__cause__ is error


def test_only_awaited_chunks_are_handed_over(run):
    """A chunk that nobody takes soon is let go and read from its file."""
    pool, _, _ = run(four_blocks(), awaited=lambda chunk: chunk[1] < 2)
    assert pool.records["blocks 2-3, chunk 0"] == "blocks 0-1, chunk 0 gave this"
    assert pool.records["blocks 2-3, chunk 2"] is None
