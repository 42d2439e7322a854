"""The dispatch loop on a pool whose calls fail as scripted."""

import random

import pytest

from orchestrator.errors import InfeasibleError, InputError, WorkerError
from orchestrator.plan.cut import cut_blocks
from orchestrator.runtime.calls import Finish, IndependentCalls, Open, Step, Verify
from orchestrator.runtime.deadline import VARIABLE
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import (
    Cause,
    FailurePolicy,
    Limits,
)
from orchestrator.runtime.pool import LocalPool
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.testing import ScriptedPool, scripted
from orchestrator.store.chunks import MissingChunk
from orchestrator.usage import Usage


class Shards:
    """Executes calls, with their labels as results; asserts that the worker that finishes a block
    has seen every chunk of its shard once, in order."""

    def __init__(self):
        self._fed = {}

    def execute(self, call, record):
        match call.command:
            case Open():
                self._fed[call.worker] = []
            case Step(index=index):
                self._fed[call.worker].append(index)
            case Finish():
                assert self._fed[call.worker] == [0, 1, 2]
        return call.label, f"{call.label} gave this"


LOST = {"lost": "the node went away"}
TOO_LARGE = {"lost": "CUDA out of memory", "cause": Cause.OUT_OF_MEMORY}


@pytest.fixture
def run():
    """Dispatch a schedule on a scripted pool. Returns the pool, the results and the events other
    than those of calls that begin."""

    def run(schedule, workers=2, script=(), policy=None, awaited=lambda chunk: False, **options):
        pool = ScriptedPool(workers, Shards().execute, scripted(script), **options)
        done, events = [], []
        dispatch(
            pool,
            schedule,
            policy or FailurePolicy(),
            on_success=lambda call, value: done.append(value),
            is_awaited=awaited,
            on_event=events.append,
        )
        assert events.pop()["event"] == "busy"
        return pool, done, [event for event in events if event["event"] != "finishing"]

    return run


def bag(count=6):
    return IndependentCalls([(f"file {n}", Verify([(f"file {n}", "")])) for n in range(count)])


def four_blocks(chunks=3):
    cut = cut_blocks(4, 2)
    present = [set() for _ in cut]
    return ShardPass(cut, todo=range(4), num_chunks=chunks, present=present, joints=range(4))


def eight_blocks():
    cut = cut_blocks(8, 4)
    present = [set() for _ in cut]
    return ShardPass(cut, todo=range(8), num_chunks=3, present=present, joints=range(8))


def test_independent_calls_survive_lost_workers(run):
    """Each unit succeeds once in spite of losses, and each loss is an event."""
    script = [("file 1", LOST), ("file 1", LOST), ("file 4", LOST)]
    pool, done, events = run(bag(), script=script)
    assert sorted(done) == [f"file {n}" for n in range(6)]
    assert [event["unit"] for event in events] == ["file 1", "file 1", "file 4"]
    assert {event["event"] for event in events} == {"lost"}
    assert max(pool.workers()) == 4
    assert len(pool.started) == 6 + 3


def test_a_lost_worker_in_a_pass_costs_its_shard_only(run):
    """Its shard is opened and fed again; other shards continue."""
    pool, done, _ = run(four_blocks(), script=[("blocks 2-3, chunk 2", LOST)])
    assert sorted(label for label in done if "finish" in label) == [
        f"block {block}, finish" for block in range(4)
    ]
    assert pool.started.count("blocks 0-1, open") == 1
    assert pool.started.count("blocks 2-3, open") == 2
    assert pool.started.count("blocks 2-3, chunk 0") == 2


def test_the_start_of_a_finish_is_announced():
    """Once for each block and attempt, with the worker that makes its unit."""
    events, script = [], scripted([("block 2, finish", LOST)])
    pool = ScriptedPool(2, Shards().execute, script)
    options = {"on_success": lambda call, value: None, "on_event": events.append}
    dispatch(pool, four_blocks(), FailurePolicy(), **options)
    begun = [event for event in events if event["event"] == "finishing"]
    assert sorted(event["block"] for event in begun) == [0, 1, 2, 2, 3]
    (lost,) = (event for event in events if event["event"] == "lost")
    at_block_2 = [(event["node"], event["pid"]) for event in begun if event["block"] == 2]
    assert at_block_2[0] == (lost["node"], lost["pid"])


def test_the_last_worker_may_be_lost_too(run):
    """A single worker and its successors complete the pass, lost in each kind of call."""
    kinds = ["open", "chunk 0", "chunk 1", "chunk 2"]
    script = [(f"blocks {blocks}, {kind}", LOST) for blocks in ("0-1", "2-3") for kind in kinds]
    script += [(f"block {block}, finish", LOST) for block in range(4)]
    _, done, events = run(four_blocks(), workers=1, script=script)
    assert sum("finish" in label for label in done) == 4
    assert len(events) == len(script)


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_losses_and_missing_chunks_ends_well(seed, run):
    """Every block is finished, whichever workers are lost and chunks are missing."""
    rng = random.Random(seed)
    pool, _, _ = run(eight_blocks(), workers=3)
    script = [(label, LOST) for label in rng.sample(pool.started, 6) for _ in range(2)]
    for boundary, chunk in rng.sample([(b, c) for b in (2, 4, 6) for c in range(3)], k=4):
        label = f"blocks {boundary}-{boundary + 1}, chunk {chunk}"
        script.append((label, {"error": MissingChunk(boundary, chunk)}))
    rng.shuffle(script)
    policy = FailurePolicy(Limits(unit=9))
    _, done, _ = run(eight_blocks(), rng.choice([1, 2, 3]), script, policy)
    assert sorted(label for label in done if "finish" in label) == [
        f"block {block}, finish" for block in range(8)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_faults_of_every_kind_together_end_well(seed, run, monkeypatch):
    """Units may fail once, in any way, on nodes that drain or are quarantined meanwhile."""
    monkeypatch.setenv(VARIABLE, "0.02")
    rng = random.Random(seed)
    pool, _, _ = run(eight_blocks(), workers=3)
    kinds = [
        LOST,
        TOO_LARGE,
        {"lost": "gone", "cause": Cause.NODE_LOST},
        {"lost": "spot", "cause": Cause.PREEMPTED},
    ]
    script = [(label, rng.choice([*kinds, "hang"])) for label in rng.sample(pool.started, 9)]
    options = {"nodes": "abcd", "drains": {"d": rng.randrange(20)}}
    _, done, _ = run(eight_blocks(), rng.choice([1, 2, 5]), script, **options)
    assert sorted(label for label in done if "finish" in label) == [
        f"block {block}, finish" for block in range(8)
    ]


def test_a_poisonous_unit_is_named(run):
    """The loop raises the policy's error after the third lost worker."""
    with pytest.raises(WorkerError, match=r"^block 1, finish: lost its worker 3 times"):
        run(four_blocks(), script=[("block 1, finish", LOST)] * 3)


def held_at_once(pool):
    """Blocks of the opened shards, in the order of their first opening."""
    return list(dict.fromkeys(label.split(",")[0] for label in pool.started if "open" in label))


def test_a_shard_that_is_too_large_is_held_in_parts(run):
    """After any call runs out of memory, blocks are held one by one, and all are finished."""
    for call in ("open", "chunk 1"):
        pool, done, events = run(four_blocks(), 1, [(f"blocks 0-1, {call}", TOO_LARGE)])
        assert held_at_once(pool) == ["blocks 0-1", *(f"block {block}" for block in range(4))]
        assert sorted(label for label in done if "finish" in label) == [
            f"block {block}, finish" for block in range(4)
        ]
        assert [event["decided"] for event in events] == ["repeat in smaller parts"]


def test_a_block_that_is_too_large_ends_the_run(run):
    """A single block that runs out of memory three times is infeasible."""
    script = [("blocks 0-1, open", TOO_LARGE), *[("block 0, open", TOO_LARGE)] * 3]
    with pytest.raises(InfeasibleError, match=r"^block 0, open: lost its worker 3 times"):
        run(four_blocks(), 1, script)


def test_a_worker_in_this_process_gives_up_its_memory():
    """The local pool drops a worker that ran out of memory before it makes another."""
    made, alive = [], []

    class FailingWorker:
        def __init__(self, task):
            made.append(len(alive))
            alive.append(self)

        def release(self):
            alive.remove(self)

        def measured(self, command, record):
            if len(made) == 1:
                raise MemoryError("cannot allocate")
            return command, None, Usage(host=1)

    done, events = [], []
    dispatch(
        LocalPool(FailingWorker, "task", "nonce"),
        bag(2),
        FailurePolicy(),
        on_success=lambda call, value: done.append(call.label),
        on_event=events.append,
    )
    assert done == ["file 0", "file 1"]
    assert made == [0, 0]
    assert "MemoryError: cannot allocate" in events[0]["log"]


def test_a_call_past_its_deadline_is_made_by_another(run, monkeypatch):
    """A hanging call is ended with its stacks; one that has ended meanwhile counts as success."""
    monkeypatch.setenv(VARIABLE, "0.05")
    pool, done, events = run(bag(), script=[("file 1", "hang")])
    assert sorted(done) == [f"file {n}" for n in range(6)]
    assert pool.abandoned == ["file 1"]
    (event,) = events
    assert (event["cause"], event["log"], event["unit"]) == ("hung", "stacks", "file 1")
    assert event["why"].startswith("no answer for 0 s")


def test_a_run_can_be_ended_while_a_call_hangs(run, monkeypatch):
    """The receiver of events is called during a long wait, and may raise."""
    monkeypatch.setattr("orchestrator.runtime.dispatch.POLLED_SECONDS", 0.0)
    pool, heard = ScriptedPool(1, Shards().execute, scripted([("file 0", "hang")])), []

    def on_event(event):
        heard.append(event)
        raise InputError("the run directory was removed")

    with pytest.raises(InputError, match="was removed"):
        dispatch(
            pool, bag(1), FailurePolicy(), on_success=lambda call, value: None, on_event=on_event
        )
    assert heard == [{"event": "polled"}]


def test_a_unit_that_hangs_on_two_nodes_ends_the_run(run, monkeypatch):
    """A unit that failed on two nodes is the cause itself."""
    monkeypatch.setenv(VARIABLE, "0.05")
    script = [("file 5", "hang"), ("file 5", {"lost": "killed"})]
    with pytest.raises(WorkerError, match=r"^file 5: its worker hung on . and died on"):
        run(bag(), script=script, nodes="ab")


def test_a_node_with_three_failures_gets_no_more_work(run):
    """Its other workers are replaced as well, and the other node does all units."""
    pool, done, events = run(bag(20), workers=4, script=[("b", LOST)] * 3, nodes="ab")
    assert sorted(done) == sorted(f"file {n}" for n in range(20))
    assert [event["event"] for event in events][:4] == ["lost", "lost", "lost", "quarantined"]
    assert events[2]["decided"] == "repeat and quarantine the node"
    assert {location.node for location in pool.workers().values()} == {"a"}


@pytest.mark.parametrize("calls", range(1, 20, 3))
def test_a_draining_node_gets_no_new_call(run, calls):
    """Running calls of a draining node succeed, and other nodes do the rest."""
    pool, done, events = run(four_blocks(), nodes="ab", drains={"b": calls})
    assert sum("finish" in label for label in done) == 4
    assert {(event["event"], event["node"]) for event in events} <= {("retired", "b")}
    assert len(events) == (calls < len(pool.started) - 2)


def test_a_missing_chunk_is_made_again(run):
    """Any free worker opens the shard that makes the chunk again."""
    missing = {"error": MissingChunk(2, 1)}
    pool, done, events = run(four_blocks(), script=[("blocks 2-3, chunk 1", missing)])
    assert sum("finish" in label for label in done) == 4
    assert events == [{"event": "missing", "unit": "blocks 2-3, chunk 1"}]
    assert pool.started.count("blocks 0-1, chunk 1") == 2
    assert pool.started.count("blocks 0-1, chunk 0") == 1


def test_a_chunk_that_never_lasts_ends_the_run(run):
    """A chunk that is missing again and again is not made without end."""
    missing = ("blocks 2-3, chunk 1", {"error": MissingChunk(2, 1)})
    with pytest.raises(WorkerError, match="damaged again"):
        run(four_blocks(), script=[missing] * 9)


def test_an_error_of_ours_ends_the_run_as_itself(run):
    """An input error is raised as itself and not repeated, because any worker would raise it."""
    error = InputError("model.layers.2: 3 weights are not finite")
    with pytest.raises(InputError) as raised:
        run(bag(), script=[("file 2", {"error": error})])
    assert raised.value is error


def test_an_error_of_others_is_given_the_unit_s_name(run):
    """A fault in the code ends the run with the unit's name and the original error."""
    error = ZeroDivisionError("division by zero")
    with pytest.raises(
        WorkerError, match=r"^file 2: ZeroDivisionError: division by zero"
    ) as raised:
        run(bag(), script=[("file 2", {"error": error})])
    assert raised.value.__cause__ is error


def test_only_awaited_chunks_are_handed_over(run):
    """A chunk that is not awaited is released, and read from its file."""
    pool, _, _ = run(four_blocks(), awaited=lambda chunk: chunk[1] < 2)
    assert pool.records["blocks 2-3, chunk 0"] == "blocks 0-1, chunk 0 gave this"
    assert pool.records["blocks 2-3, chunk 2"] is None


def test_workers_come_for_what_a_schedule_can_use(run):
    """A growing run uses new workers, and requests no more than the schedule can use."""
    pool, done, _ = run(bag(), workers=1, growing_to=4)
    assert len(done) == 6
    assert len(pool.workers()) == 4
    assert pool.asked[0] == 6
    assert pool.asked[-1] == 1


def test_an_idle_worker_that_is_too_many_is_given_back(run, monkeypatch):
    """Idle surplus workers are given back, with an event; the busy one stays."""
    monkeypatch.setattr("orchestrator.runtime.scaling.IDLE_SECONDS", -1.0)
    pool, done, events = run(bag(4), workers=4)
    assert len(done) == 4
    assert len(pool.workers()) == 1
    assert [event["event"] for event in events] == ["returned"] * 3
    assert {event["pid"] for event in events} | set(pool.workers()) == {0, 1, 2, 3}


def test_who_holds_a_shard_is_never_given_back(run, monkeypatch):
    """A worker that holds a shard is not given back while it waits; free ones are."""
    monkeypatch.setattr("orchestrator.runtime.scaling.IDLE_SECONDS", -1.0)
    pool, done, events = run(four_blocks(), workers=4)
    assert [event["event"] for event in events].count("returned") == 3
    opened = [label for label in pool.started if label.endswith("open")]
    assert sorted(opened) == ["blocks 0-1, open", "blocks 2-3, open"]
    assert done


def test_a_growing_run_waits_for_its_nodes(run, monkeypatch):
    """With all nodes quarantined, a growing run waits for new nodes, and others end."""
    monkeypatch.setattr("orchestrator.runtime.dispatch.PATIENCE_SECONDS", -1.0)

    for growing, ends in ((0, True), (1, False)):
        pool = ScriptedPool(0, Shards().execute, growing_to=growing)
        pool.nodes.quarantine("a")
        events = []

        def on_event(event, events=events):
            events.append(event)
            if len(events) == 3:
                raise InterruptedError

        with pytest.raises(WorkerError if ends else InterruptedError):
            dispatch(
                pool,
                bag(),
                FailurePolicy(),
                on_success=lambda call, value: None,
                on_event=on_event,
            )
        assert len(events) == (1 if ends else 3)
