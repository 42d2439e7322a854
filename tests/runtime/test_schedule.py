"""Schedules of a pass and of independent calls, without Ray and without tensors."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.plan.cut import cut_blocks
from orchestrator.runtime.calls import Finish, IndependentCalls, Open, Step
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import Cause, FailurePolicy, Limits
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.runtime.testing import ScriptedPool
from orchestrator.store.chunks import MissingChunk


class SimulatedPass:
    """Dispatches a pass to workers that end their calls in a random order, and checks each call.

    Args:
        loss: Probability that a call is lost with its worker.
        want: Probability that it runs out of memory.
        beside: Chunks of the other pass, for a pass that reads them.
    """

    def __init__(self, schedule, workers, seed=0, loss=0.0, want=0.0, beside=None):
        self.schedule = schedule
        self.rng = random.Random(seed)
        self.loss, self.want = loss, want
        self.pool = ScriptedPool(workers, self.execute, self.fate, order=self.rng)
        self.held = {}
        self.performed = Counter()
        self.finished = []
        self.beside = beside
        self.there = {
            schedule.boundary(k): set(chunks) for k, chunks in enumerate(schedule._present)
        }

    def run(self):
        # so many losses would end a run
        policy = FailurePolicy(Limits(*[10**6] * 4))
        dispatch(
            self.pool,
            self.schedule,
            policy,
            on_success=lambda call, value: None,
            on_event=lambda event: None,
        )
        return self

    def fate(self, call, node):
        assert len(self.pool.running) < self.schedule.max_workers
        if self.rng.random() < self.want:
            return self.lose(call, Cause.OUT_OF_MEMORY)
        return self.lose(call, Cause.DIED) if self.rng.random() < self.loss else None

    def lose(self, call, cause):
        self.held.pop(call.worker, None)
        return {"lost": "by chance", "cause": cause}

    def execute(self, call, record):
        self.performed[call.label] += 1
        match call.command:
            case Open(blocks=blocks):
                self.held[call.worker] = [range(*blocks), []]
            case Step():
                self.step(call)
            case Finish(block=block):
                assert block in self.held[call.worker][0]
                assert self.held[call.worker][1] == list(range(self.schedule.num_chunks))
                self.finished.append(block)
        return None, None

    def step(self, call):
        blocks, fed = self.held[call.worker]
        boundary, index = call.takes
        entry = (blocks.start, index)
        if self.beside is not None and blocks.start and entry not in self.beside:
            del self.held[call.worker]
            raise MissingChunk(*entry)
        assert boundary in (blocks.start, blocks.stop)
        assert index in self.there[boundary], "took a chunk that is not there"
        assert not fed or fed[-1] < index, "chunks out of order"
        fed.append(index)
        if call.emits:
            assert {boundary, call.emits[0]} == {blocks.start, blocks.stop}
            self.there.setdefault(call.emits[0], set()).add(call.emits[1])


def make_pass(blocks=10, shards=4, chunks=5, todo=None, results=None, present=None, **options):
    cut = cut_blocks(blocks, shards)
    return ShardPass(
        cut[::-1] if options.get("backward") else cut,
        todo=range(blocks) if todo is None else todo,
        num_chunks=chunks,
        present=present or [set() for _ in cut],
        results=results,
        **options,
    )


@pytest.mark.parametrize("joints", [(), range(6)])
def test_steps_that_compute_logits_are_a_kind_of_their_own(joints):
    """Steps through the last block, if the pass has results; also if no shard may be cut."""
    about = {"blocks": 6, "shards": 3, "todo": (), "joints": joints}
    schedule = make_pass(results=set(), **about)
    assert schedule.to_do() == {"forward": 20.0, "score": 10.0, "open": 6.0, "finish": 0.0}
    assert "score" not in make_pass(**about).to_do()


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("shards", [1, 2, 4, 10])
def test_every_block_is_finished_once_after_every_chunk_in_order(workers, shards):
    """A pass ends with any number of workers and shards, and executes each call once."""
    simulation = SimulatedPass(make_pass(shards=shards), workers, seed=workers).run()
    assert sorted(simulation.finished) == list(range(10))
    assert set(simulation.performed.values()) == {1}


@pytest.mark.parametrize("seed", range(20))
def test_losing_workers_loses_nothing(seed):
    """Each block is finished exactly once, whichever workers are lost in whichever calls."""
    simulation = SimulatedPass(make_pass(), workers=3, seed=seed, loss=0.1).run()
    assert sorted(simulation.finished) == list(range(10))


@pytest.mark.parametrize("seed", range(10))
def test_a_backward_pass_goes_from_the_last_shard_to_the_first(seed):
    """Chunks enter a shard after its last block; lost workers change nothing else."""
    schedule = make_pass(backward=True)
    (call,) = schedule.calls([0])
    assert call.command == Open(blocks=(8, 10), todo=(8, 9), ahead=(6, 8))
    schedule.lost(call)
    simulation = SimulatedPass(schedule, workers=3, seed=seed, loss=0.05).run()
    assert sorted(simulation.finished) == list(range(10))
    assert [schedule.boundary(k) for k in range(5)] == [10, 8, 6, 3, 0]


@given(data=st.data())
def test_a_pass_that_reads_another_ones_chunks_breaks_off_and_is_gone_on_with(data):
    """Each block is finished once, whichever chunks are lost and whichever calls lack memory."""
    blocks = data.draw(st.integers(1, 9), label="blocks")
    group = data.draw(st.integers(1, 2), label="group")
    cut = cut_blocks(blocks, data.draw(st.integers(1, blocks), label="shards"), group)
    workers, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 999))
    todo, there, lost = (
        set(range(blocks)),
        {},
        data.draw(st.sets(st.tuples(*[st.integers(0, 8)] * 2))),
    )
    while todo:
        schedule = ShardPass(
            cut[::-1],
            todo=todo,
            num_chunks=3,
            present=[there.get(part.stop, set()) for part in cut[::-1]],
            backward=True,
            joints=range(0, blocks, group),
            reads_beside=True,
        )
        beside = {(part.start, index) for part in cut for index in range(3)} - lost
        simulation = SimulatedPass(
            schedule, workers, seed, loss=0.05, want=0.05, beside=beside
        ).run()
        assert todo >= set(simulation.finished)
        assert schedule.broken_off or todo == set(simulation.finished)
        todo -= set(simulation.finished)
        cut, there, lost = schedule.following_cut(), simulation.there, set()
        assert [block for part in cut for block in part] == list(range(blocks))
        assert all(part.start % group == 0 for part in cut)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pass_that_keeps_fills_every_boundary(workers):
    """Chunks after a gap do not replace those in the gap, and none is dropped."""
    present = [set(), {0}, set(range(5)), {3}]
    schedule = make_pass(todo=[], results=set(range(5)), present=present, keeps=[3, 6, 8])
    simulation = SimulatedPass(schedule, workers).run()
    assert simulation.there[3] == simulation.there[6] == simulation.there[8] == set(range(5))
    assert schedule.drop_inputs() == []
    assert not any(label.startswith("blocks 8-9, chunk") for label in simulation.performed)


def test_a_block_that_is_committed_is_not_finished_again():
    """Committed blocks only pass on the chunks that later blocks need."""
    simulation = SimulatedPass(make_pass(todo=[7]), workers=2).run()
    assert simulation.finished == [7]
    assert not any(label.startswith("blocks 8-9") for label in simulation.performed)


def test_chunks_that_are_there_are_not_computed_again():
    """A resumed pass starts at the boundary whose chunks are stored."""
    present = [set(), set(range(5)), {0, 1}, set()]
    simulation = SimulatedPass(make_pass(todo=[8, 9], present=present), workers=1).run()
    steps = [label for label in simulation.performed if "chunk" in label]
    assert not any(label.startswith("blocks 0-2") for label in steps)
    assert [label for label in steps if label.startswith("blocks 3-5")] == [
        f"blocks 3-5, chunk {index}" for index in (2, 3, 4)
    ]


def test_results_behind_the_last_shard_are_made_once():
    """A pass with results steps only through the chunks whose result is missing."""
    simulation = SimulatedPass(make_pass(todo=[], results={0, 2}), workers=2).run()
    last = [label for label in simulation.performed if label.startswith("blocks 8-9, chunk")]
    assert sorted(last) == [f"blocks 8-9, chunk {index}" for index in (1, 3, 4)]


def test_a_chunk_is_handed_over_only_where_somebody_waits_for_it():
    """With one worker the file is enough; with two, the second holds the next shard."""
    for workers, expected in [(1, False), (2, True)]:
        schedule = make_pass(blocks=4, shards=2, chunks=2)
        for call in schedule.calls(range(workers)):
            schedule.succeeded(call)
        step = schedule.calls([0])[0]
        assert step.command == Step(0, emit=True, hand_over=expected, next_index=1)
        schedule.succeeded(step)
        step = schedule.calls([0])[0]
        # behind the last chunk there is none to write it beside
        assert step.command == Step(1, emit=True, hand_over=expected, next_index=None)


def test_an_opened_shard_names_the_blocks_to_read_ahead():
    """The worker of the first shard is free first, and takes the first free shard."""
    schedule = make_pass(blocks=10, shards=5)
    opened = schedule.calls([0, 1])
    assert [call.command.blocks for call in opened] == [(0, 2), (2, 4)]
    assert [call.command.ahead for call in opened] == [(4, 6), (6, 8)]
    schedule = make_pass(blocks=10, shards=5)
    assert [call.command.ahead for call in schedule.calls(range(4))] == [(8, 10), None, None, None]


def test_a_pass_with_nothing_to_do_is_finished():
    """No call is made if all blocks are committed."""
    schedule = make_pass(todo=[])
    assert schedule.finished
    assert schedule.calls([0, 1]) == []


def test_a_starved_worker_gives_its_shard_up_for_an_earlier_one():
    """The last worker takes the free shard whose chunks it waits for."""
    schedule = make_pass(blocks=4, shards=2, chunks=2)
    first, second = schedule.calls([0, 1])
    schedule.succeeded(second)
    schedule.lost(first)
    (call,) = schedule.calls([1])
    assert (call.command, call.shard) == (Open((0, 2), (0, 1), ahead=(2, 4)), 0)


def test_spent_boundaries_are_dropped_and_not_needed_again():
    """The input of a done shard may be dropped, and the shard before it stays done."""
    schedule = make_pass(blocks=2, shards=2, chunks=1)
    dropped = []
    while not schedule.finished:
        for call in schedule.calls([0]):
            schedule.succeeded(call)
            dropped += schedule.drop_inputs()
    assert dropped == [1]
    assert all(schedule.is_done(shard) for shard in range(2))


def test_a_missing_chunk_is_computed_again():
    """A damaged chunk sends the pass back to the shard that makes it."""
    schedule = make_pass(blocks=2, shards=2, chunks=1, todo=[1])
    calls = []
    damaged = True
    while not schedule.finished:
        (call,) = schedule.calls([0])
        calls.append(call.label)
        if isinstance(call.command, Step) and call.shard == 1 and damaged:
            damaged = False
            schedule.input_missing(call, call.takes)
        else:
            schedule.succeeded(call)
    assert calls.count("block 0, chunk 0") == 2
    assert calls.count("block 1, finish") == 1


def test_only_chunks_that_are_taken_soon_are_held():
    """A chunk is awaited if a worker holds its shard and takes it within the window."""
    schedule = make_pass(blocks=2, shards=2, chunks=9)
    assert not schedule.is_awaited((1, 0), window=3)
    schedule.calls([0, 1])
    assert [i for i in range(9) if schedule.is_awaited((1, i), window=3)] == [0, 1, 2]


@given(data=st.data())
def test_splitting_shards_changes_no_statistic(data):
    """Whichever calls lack memory and whichever workers are lost, each block is finished once, by
    a worker that has seen every chunk in order, and no missing chunk is taken."""
    blocks = data.draw(st.integers(1, 12), label="blocks")
    group = data.draw(st.integers(1, 3), label="group")
    count = data.draw(st.integers(1, 4), label="chunks")
    cut = cut_blocks(blocks, data.draw(st.integers(1, blocks), label="shards"), group)
    chunks = st.sets(st.integers(0, count - 1))
    schedule = ShardPass(
        cut,
        todo=data.draw(st.sets(st.integers(0, blocks - 1)), label="todo"),
        num_chunks=count,
        present=[data.draw(chunks, label="present") for _ in cut],
        results=data.draw(st.none() | chunks, label="results"),
        joints=range(0, blocks, group),
    )
    todo = [block for state in schedule.shards for block in state.todo]
    workers, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 999))
    simulation = SimulatedPass(schedule, workers, seed, loss=0.05, want=0.1).run()
    assert sorted(simulation.finished) == todo
    assert [block for part in schedule.cut for block in part] == list(range(blocks))
    assert all(part.start % group == 0 for part in schedule.cut)
    if schedule._wants_results:
        assert simulation.there[blocks] == set(range(count))


def test_one_call_out_of_memory_splits_all_free_shards():
    """Free unfinished shards are split with it; held and done shards stay."""
    schedule = make_pass(blocks=8, shards=4, chunks=1, joints=range(8))
    while not schedule.is_done(0):
        (call,) = schedule.calls([0])
        schedule.succeeded(call)
    first, second = schedule.calls([0, 1])
    assert (first.label, second.label) == ("blocks 2-3, open", "blocks 4-5, open")
    assert schedule.shrink_after_oom(first)
    cut = [range(0, 2), range(2, 3), range(3, 4), range(4, 6), range(6, 7), range(7, 8)]
    assert schedule.cut == cut
    schedule.succeeded(second)
    (step,) = schedule.calls([0])
    assert step.label == "block 2, open"


def test_a_shard_without_joints_is_not_split():
    """A shard of one block, or of one group of blocks, or without inner joints is not split."""
    for options in ({"shards": 10, "joints": range(10)}, {"shards": 4}, {"joints": [0, 3, 6, 8]}):
        schedule = make_pass(**options)
        (call,) = schedule.calls([0])
        assert not schedule.shrink_after_oom(call)
        schedule.lost(call)
        assert schedule.calls([1])[0].command == call.command


def test_a_retired_worker_leaves_its_shard_to_others():
    """Another worker opens its shard again, from the first chunk."""
    schedule = make_pass(blocks=2, shards=1, chunks=2)
    for _ in range(2):
        (call,) = schedule.calls([0])
        schedule.succeeded(call)
    schedule.retired(0)
    calls = []
    while not schedule.finished:
        (call,) = schedule.calls([1])
        calls.append(call.command)
        schedule.succeeded(call)
    steps = [Step(0, next_index=1), Step(1)]
    assert calls == [Open((0, 2), (0, 1)), *steps, Finish(0), Finish(1)]


def test_independent_calls_run_once_and_lost_ones_again():
    """Each unit succeeds once, whichever call is lost."""
    bag = IndependentCalls([(f"file {n}", Finish(n)) for n in range(5)])
    done, lost_once = [], False
    while not bag.finished:
        for call in bag.calls([0, 1]):
            if call.label == "file 2" and not lost_once:
                lost_once = True
                bag.lost(call)
            else:
                bag.succeeded(call)
                done.append(call.command.block)
    assert sorted(done) == list(range(5))


def test_a_shard_goes_where_its_chunks_are_made():
    """Neighbouring shards go to one node, and the shard of a lost worker back to its node."""
    nodes = {0: "a", 1: "b", 2: "a", 3: "b", 4: "b"}
    schedule = ShardPass(
        cut_blocks(8, 4), todo=range(8), num_chunks=3, present=[set() for _ in range(4)]
    )
    calls = schedule.calls([0, 1, 2, 3], nodes)
    assert [(call.worker, call.shard) for call in calls] == [(0, 0), (2, 1), (1, 2), (3, 3)]
    for call in calls:
        schedule.succeeded(call)
    schedule.retired(1)
    schedule.retired(3)
    nodes = {4: "b", 5: "a", 6: "b"}
    took = {call.shard: call.worker for call in schedule.calls([4, 5, 6], nodes)}
    assert took == {2: 5, 3: 4}, "behind shard 1, which is on a; then anywhere"


def test_the_number_of_useful_workers_falls_to_zero():
    """The number of useful workers falls with the remaining calls, to 0 at the end."""
    bag = IndependentCalls([(f"file {n}", Finish(n)) for n in range(3)])
    seen = []
    while not bag.finished:
        seen.append(bag.max_workers)
        for call in bag.calls([0, 1]):
            bag.succeeded(call)
    assert seen == [3, 1]
    assert bag.max_workers == 0
