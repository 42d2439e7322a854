"""The schedule of blocks that are lent to all workers, as a value; no Ray, no tensors."""

import random
from itertools import chain as joined

import pytest

from orchestrator.errors import WorkerError
from orchestrator.models.training.refine_ledger import Ledger
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.replicated_blocks import FIRST, Found, ReplicatedBlocks, Round
from orchestrator.stages.walk.program import walk_block

ROUNDS = ((FIRST, 5, False), ("descend", 3, True), ("descend", 3, True), ("leave", 5, False))


def rounds(block, is_made):
    """A block's program: passes around two steps; it gives its rounds' values."""
    values = []
    for method, parts, merges in ROUNDS:
        if method == "descend" and is_made:
            continue
        found = yield Round(method=method, what=method, parts=parts, merges=merges)
        values.append((method, found.values))
    return None if is_made else values


class Replica:
    """What a worker holds: the steps that it has made, each as the slices it was summed from."""

    def __init__(self):
        self.steps = self.pending = None

    def perform(self, call, records):
        _, is_first, reads, emits, parts = call.arguments
        assert reads == bool(call.gathers)
        if is_first and call.method == FIRST:
            self.steps, self.pending = [], []
        elif is_first and (merged := list(joined(*records)) if reads else self.pending):
            self.steps.append(sorted(merged))
            self.pending = []
        made = [(len(self.steps), part) for part in parts] if call.method == "descend" else []
        if made and not emits:
            self.pending += made
        values = {part: (call.method, len(self.steps), part) for part in parts}
        return {"parts": values, "state": list(self.steps)}, made if emits else None


def drive(chain, workers=(0, 1), *, loss=0.0, gone=0.0, late=0.0, seed=0):
    """Performs a chain with calls that end in any order; what ended, and every call that did."""
    rng, replicas = random.Random(seed), {worker: Replica() for worker in workers}
    records, running, ended, done = {}, [], [], []
    for _ in range(20_000):
        ended += chain.ended()
        if chain.finished:
            assert not any(map(chain.is_awaited, records))
            return ended, done
        busy = {call.worker for call, _ in running}
        for call in chain.calls([worker for worker in replicas if worker not in busy]):
            assert call.worker not in busy
            busy.add(call.worker)
            gathered = [records.get(chunk) for chunk in call.gathers]
            running.append((call, gathered))
        records = {chunk: record for chunk, record in records.items() if chain.is_awaited(chunk)}
        if rng.random() < late:
            replicas[max(replicas, default=-1) + 1] = Replica()
        call, gathered = running.pop(rng.randrange(len(running)))
        if rng.random() < loss:
            del replicas[call.worker]
            chain.lost(call)
            replicas[max([*replicas, call.worker]) + 1] = Replica()
        elif gathered and (None in gathered or rng.random() < gone):
            chain.input_missing(call, (0, 0))
        else:
            value, record = replicas[call.worker].perform(call, gathered)
            chain.succeeded(call)
            chain.record_result(call, value)
            done.append(call)
            if record is not None and chain.is_awaited(call.emits):
                records[call.emits] = record
    raise AssertionError("the chain does not come to an end")


def expected(blocks):
    """What the programs of blocks give, whoever performs them."""
    steps = {FIRST: [0], "descend": [0, 1], "leave": [2]}
    values = []
    for method in (FIRST, "descend", "leave"):
        parts = 3 if method == "descend" else 5
        values += [(method, [(method, step, p) for p in range(parts)]) for step in steps[method]]
    return [(block, values) for block in blocks]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 9])
def test_any_crew_makes_the_same_of_every_block(workers):
    """Values come in the order of the parts, after the same steps; each part is made once."""
    chain = ReplicatedBlocks(todo=[2, 0, 1], present=[], program=rounds)
    ended, done = drive(chain, range(workers))
    assert ended == expected(range(3))
    assert sum(len(call.arguments[4]) for call in done) == 3 * (5 + 3 + 3 + 5)
    assert len(done) == 3 * 4 * workers


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_parts_are_shared_evenly(workers):
    """No replica makes more parts of a round than another, and one."""
    _, done = drive(ReplicatedBlocks(todo=[0], present=[], program=rounds), range(workers))
    for at in range(len(ROUNDS)):
        shares = [len(call.arguments[4]) for call in done[at * workers : (at + 1) * workers]]
        assert max(shares) - min(shares) <= 1


def test_a_replica_that_is_alone_hands_over_nothing():
    """It keeps what it makes: all parts of every round, in one call."""
    _, done = drive(ReplicatedBlocks(todo=[0], present=[], program=rounds), [3])
    assert [call.emits for call in done] == [None] * 4
    assert [call.arguments[4] for call in done] == [tuple(range(n)) for n in (5, 3, 3, 5)]


def test_it_begins_where_the_input_lies_and_ends_behind_the_last():
    """The nearest boundary before the first block to make; made blocks are gone through."""
    for present, first in (([], 0), ([1], 1), ([1, 3], 3), ([1, 4, 5], 1), ([2, 6], 2)):
        ended, _ = drive(ReplicatedBlocks(todo=[3, 5], present=present, program=rounds))
        made = dict(expected(range(6)))
        assert ended == [(b, made[b] if b in (3, 5) else None) for b in range(first, 6)]


def test_nothing_to_do_is_finished():
    """A chain whose blocks are all made asks for nothing."""
    chain = ReplicatedBlocks(todo=[], present=[4], program=rounds)
    assert chain.finished
    assert chain.calls([0]) == []


@pytest.mark.parametrize("seed", range(60))
def test_accidents_change_nothing_of_what_is_made(seed):
    """Workers lost at any moment, records gone, workers that come late: the same of every block.

    The replicas' own check, that all have made the same steps, holds throughout.
    """
    chain = ReplicatedBlocks(todo=range(4), present=[], program=rounds)
    workers = range(1 + seed % 4)
    ended, _ = drive(chain, workers, loss=0.1, gone=0.02, late=0.05, seed=seed)
    assert ended == expected(range(4))


def test_a_lost_worker_costs_the_others_what_it_was_at():
    """Its parts are made by who is left, in the same state; nothing is made twice."""
    chain = ReplicatedBlocks(todo=[0], present=[], program=rounds)
    calls = chain.calls([0, 1, 2])
    assert [call.arguments[4] for call in calls] == [(0, 1), (2, 3), (4,)]
    chain.lost(calls[1])
    assert chain.calls([]) == []
    chain.succeeded(calls[0])
    chain.record_result(calls[0], {"parts": {0: "a", 1: "b"}, "state": 0})
    (again,) = chain.calls([0, 3])
    assert (again.worker, again.arguments[4]) == (0, (2, 3))
    assert not again.arguments[1]


def test_a_worker_given_up_between_its_calls_is_missed_by_nobody():
    """The round goes on without it; the last one takes the block with it."""
    chain = ReplicatedBlocks(todo=[0], present=[], program=rounds)
    one, other = chain.calls([0, 1])
    chain.succeeded(one)
    chain.record_result(one, {"parts": dict.fromkeys(one.arguments[4], 0), "state": 0})
    chain.retired(0)
    assert chain.calls([]) == []
    chain.succeeded(other)
    chain.record_result(other, {"parts": dict.fromkeys(other.arguments[4], 0), "state": 0})
    (following,) = chain.calls([1, 2])
    assert (following.worker, following.method) == (1, "descend")
    chain.lost(following)
    assert {call.method for call in chain.calls([2, 3])} == {FIRST}


def test_a_missing_input_is_made_again_from_the_models():
    """What was made stays and is gone through."""
    chain = ReplicatedBlocks(todo=range(3), present=[], program=rounds)
    replica, ended = Replica(), []
    while not ended:
        (call,) = chain.calls([0])
        value, _ = replica.perform(call, [])
        chain.succeeded(call)
        chain.record_result(call, value)
        ended = chain.ended()
    (call,) = chain.calls([0])
    chain.input_missing(call, (0, 0))
    ended, _ = drive(chain)
    assert ended == [(0, None), *expected([1, 2])]


def test_replicas_that_differ_end_the_run():
    """One line that names the block and both states; what is not a number is equal to itself."""
    for states, fits in (((float("nan"), float("nan")), True), ((1.0, 1.0 + 2**-52), False)):
        chain = ReplicatedBlocks(todo=[0], present=[], program=rounds)
        for call, state in zip(chain.calls([0, 1]), states, strict=True):
            value = {"parts": dict.fromkeys(call.arguments[4]), "state": float(state)}
            chain.succeeded(call)
            if fits or call.worker == 0:
                chain.record_result(call, value)
            else:
                with pytest.raises(WorkerError, match=r"block 0, look, part 3-4: .* differ"):
                    chain.record_result(call, value)


def perform(program, give):
    """A program's rounds, with what `give` says of each, and what it comes to."""
    asked = [next(program)]
    while True:
        try:
            asked.append(program.send(give(asked[-1])))
        except StopIteration as end:
            return asked, end.value


def walk(errors, **options):
    """The rounds of a block whose held-out errors are these, and its facts."""
    coming = iter(errors)
    given = {
        FIRST: lambda each: Found([(10, 5.0)] * each.parts, {}),
        "compensate": lambda each: Found([], {"linears": {"q": 1}}),
        "evaluate": lambda each: Found([(10, next(coming))], {"norm": 2.0}),
        "descend": lambda each: Found([((0.25,), 10)] * each.parts, {"norm": 2.0}),
        "leave": lambda each: Found([(10, 3.0)] * each.parts, {"norm": None}),
        "commit": lambda each: Found([each.about[0]], {}),
    }
    program = walk_block(
        3, 5, is_made=False, is_changed=True, compensates=True, refinement=RefineOptions(**options)
    )
    return perform(program, lambda each: given[each.method](each))


def test_a_block_is_trained_until_it_gets_no_better():
    """The state behind the best epoch is kept, before the next step; the last one is not."""
    options = {"epochs": 9, "batches": 2, "patience": 2, "slices": 8, "held_out": 0.2}
    asked, facts = walk([40.0, 30.0, 35.0, 32.0], **options)
    epoch = ["descend", "descend", "evaluate"]
    expected = [FIRST, "compensate", "evaluate", *epoch * 3, "leave", "commit"]
    assert [each.method for each in asked] == expected
    kept = [each.about for each in asked if each.method == "descend"]
    assert kept == [(e, b, (e, b) == (1, 0)) for e in range(3) for b in range(2)]
    assert asked[-2].about == (False,)
    refined = facts["refinement"]
    assert (refined["best"], refined["stop"], refined["steps"]) == (1, "patience", 6)
    assert [each["held_out"] for each in refined["epochs"]] == [3.0, 3.5, 3.2]
    assert [each["gradient"] for each in refined["epochs"]] == [2.0] * 3
    assert (facts["before"], facts["after"], facts["linears"]) == (0.5, 0.3, {"q": 1})


def test_the_last_state_is_kept_where_it_is_the_best():
    """It is told to the round behind the training."""
    asked, facts = walk([40.0, 30.0, 20.0], epochs=2, batches=1, held_out=0.2)
    assert asked[-2].about == (True,)
    assert (facts["refinement"]["best"], facts["refinement"]["stop"]) == (2, "end")


@pytest.mark.parametrize(("slices", "parts"), [(1, [1, 1]), (2, [2, 2]), (3, [3, 2]), (8, [3, 2])])
def test_a_step_has_as_many_parts_as_are_allowed_and_it_has_chunks(slices, parts):
    """Of five chunks to train on the first batch has three."""
    ledger = Ledger(6, RefineOptions(batches=2, slices=slices))
    assert [ledger.parts(batch) for batch in range(2)] == parts
