"""Schedule of replicated blocks, as a value, without Ray and without tensors."""

import random
from collections import defaultdict
from itertools import chain as joined

import pytest

from orchestrator.errors import WorkerError
from orchestrator.models.training.refine_ledger import Ledger
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import FailurePolicy, Limits
from orchestrator.runtime.replicated_blocks import Found, ReplicatedBlocks, Round
from orchestrator.runtime.testing import ScriptedPool
from orchestrator.stages.walk.commands import ComputeGradients, ForwardCompressed, ForwardDense
from orchestrator.stages.walk.program import walk_block
from orchestrator.store.chunks import MissingChunk

ROUNDS = (
    ("forward_dense", 5, False),
    ("compute_gradients", 3, True),
    ("compute_gradients", 3, True),
    ("forward_compressed", 5, False),
)


def command_of(method, block=0):
    commands = (
        ForwardDense(block=block, is_committed=False),
        ComputeGradients(epoch=0, batch=0, keep=False),
        ForwardCompressed(keep=False),
    )
    return next(each for each in commands if each.method == method)


def rounds(block, is_made):
    """Program of a block: passes around two steps. Returns the values of its rounds."""
    values = []
    for method, parts, merges in ROUNDS:
        if method == "compute_gradients" and is_made:
            continue
        command = command_of(method, block)
        found = yield Round(command=command, what=method, parts=parts, merges=merges)
        values.append((method, found.values))
    return None if is_made else values


class Replica:
    """State of a worker: its steps, each as the slices of which it is the sum."""

    def __init__(self):
        self.steps = self.pending = None

    def perform(self, call, records):
        command = call.command
        assert command.reads == bool(call.gathers)
        if command.is_first and isinstance(command, ForwardDense):
            self.steps, self.pending = [], []
        elif command.is_first and (
            merged := list(joined(*records)) if command.reads else self.pending
        ):
            self.steps.append(sorted(merged))
            self.pending = []
        parts = command.parts
        made = (
            [(len(self.steps), each) for each in parts]
            if call.method == "compute_gradients"
            else []
        )
        if made and not command.emits:
            self.pending += made
        values = {part: (call.method, len(self.steps), part) for part in parts}
        return {"parts": values, "state": list(self.steps)}, made if command.emits else None


def drive(schedule, workers=2, *, loss=0.0, gone=0.0, late=0.0, seed=0):
    """Dispatches a schedule to replicas that end their calls in a random order.

    Args:
        loss: Probability that a call is lost with its worker.
        gone: Probability that a record that it reads is gone.
        late: Probability that a worker is added as a call ends.

    Returns:
        The blocks that ended, and every call that did.
    """
    rng, replicas, ended, done = random.Random(seed), defaultdict(Replica), [], []

    def fate(call, node):
        if rng.random() < late:
            pool.add()
        return {"lost": "by chance"} if rng.random() < loss else None

    def execute(call, records):
        if call.gathers and (None in records or rng.random() < gone):
            raise MissingChunk(0, 0)
        return replicas[call.worker].perform(call, records)

    def on_success(call, value):
        schedule.record_result(call, value)
        ended.extend(schedule.ended())
        done.append(call)

    pool = ScriptedPool(workers, execute, fate, order=rng)
    dispatch(
        pool,
        schedule,
        FailurePolicy(Limits(*[10**6] * 4)),
        on_success=on_success,
        is_awaited=schedule.is_awaited,
        on_event=lambda event: None,
    )
    assert not any(map(schedule.is_awaited, (call.emits for call in done)))
    return [*schedule.ended(), *ended], done


def expected(blocks):
    """Results of the programs of blocks."""
    steps = {"forward_dense": [0], "compute_gradients": [0, 1], "forward_compressed": [2]}
    values = []
    for method in ("forward_dense", "compute_gradients", "forward_compressed"):
        parts = 3 if method == "compute_gradients" else 5
        values += [(method, [(method, step, p) for p in range(parts)]) for step in steps[method]]
    return [(block, values) for block in blocks]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 9])
def test_any_number_of_workers_gives_the_same_result(workers):
    """Values are in the order of the parts, after the same steps; each part is made once."""
    schedule = ReplicatedBlocks(todo=[2, 0, 1], present=[], program=rounds)
    ended, done = drive(schedule, workers)
    assert ended == expected(range(3))
    assert sum(len(call.command.parts) for call in done) == 3 * (5 + 3 + 3 + 5)
    assert len(done) == 3 * 4 * workers


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_parts_are_shared_evenly(workers):
    """The numbers of parts of two replicas in a round differ by one at most."""
    _, done = drive(ReplicatedBlocks(todo=[0], present=[], program=rounds), workers)
    for at in range(len(ROUNDS)):
        shares = [len(call.command.parts) for call in done[at * workers : (at + 1) * workers]]
        assert max(shares) - min(shares) <= 1


def test_a_replica_that_is_alone_hands_over_nothing():
    """A single replica makes all parts of each round in one call, and emits no record."""
    _, done = drive(ReplicatedBlocks(todo=[0], present=[], program=rounds), 1)
    assert [call.emits for call in done] == [None] * 4
    assert [call.command.parts for call in done] == [tuple(range(n)) for n in (5, 3, 3, 5)]


def test_it_begins_where_the_input_lies_and_ends_behind_the_last():
    """It begins at the nearest stored boundary; blocks that are made are passed through."""
    for present, first in (([], 0), ([1], 1), ([1, 3], 3), ([1, 4, 5], 1), ([2, 6], 2)):
        ended, _ = drive(ReplicatedBlocks(todo=[3, 5], present=present, program=rounds))
        made = dict(expected(range(6)))
        assert ended == [(b, made[b] if b in (3, 5) else None) for b in range(first, 6)]


def test_nothing_to_do_is_finished():
    """A schedule whose blocks are all made gives no call."""
    schedule = ReplicatedBlocks(todo=[], present=[4], program=rounds)
    assert schedule.finished
    assert schedule.calls([0]) == []


@pytest.mark.parametrize("seed", range(60))
def test_accidents_change_nothing_of_what_is_made(seed):
    """Lost workers, lost records and late workers do not change the result of a block.

    The replicas' own check, that all have made the same steps, holds throughout.
    """
    schedule = ReplicatedBlocks(todo=range(4), present=[], program=rounds)
    ended, _ = drive(schedule, 1 + seed % 4, loss=0.1, gone=0.02, late=0.05, seed=seed)
    assert ended == expected(range(4))


def test_a_lost_worker_costs_the_others_what_it_was_at():
    """The other replicas make its parts, in the same state; no part is made twice."""
    schedule = ReplicatedBlocks(todo=[0], present=[], program=rounds)
    calls = schedule.calls([0, 1, 2])
    assert [call.command.parts for call in calls] == [(0, 1), (2, 3), (4,)]
    schedule.lost(calls[1])
    assert schedule.calls([]) == []
    schedule.succeeded(calls[0])
    schedule.record_result(calls[0], {"parts": {0: "a", 1: "b"}, "state": 0})
    (again,) = schedule.calls([0, 3])
    assert (again.worker, again.command.parts) == (0, (2, 3))
    assert not again.command.is_first


def test_a_worker_given_up_between_its_calls_is_missed_by_nobody():
    """The round continues without it; the loss of the last replica restarts the block."""
    schedule = ReplicatedBlocks(todo=[0], present=[], program=rounds)
    one, other = schedule.calls([0, 1])
    schedule.succeeded(one)
    schedule.record_result(one, {"parts": dict.fromkeys(one.command.parts, 0), "state": 0})
    schedule.retired(0)
    assert schedule.calls([]) == []
    schedule.succeeded(other)
    schedule.record_result(other, {"parts": dict.fromkeys(other.command.parts, 0), "state": 0})
    (following,) = schedule.calls([1, 2])
    assert (following.worker, following.method) == (1, "compute_gradients")
    schedule.lost(following)
    assert {call.method for call in schedule.calls([2, 3])} == {"forward_dense"}


def test_a_missing_input_is_made_again_from_the_models():
    """Blocks that are made stay, and are passed through again."""
    schedule = ReplicatedBlocks(todo=range(3), present=[], program=rounds)
    replica, ended = Replica(), []
    while not ended:
        (call,) = schedule.calls([0])
        value, _ = replica.perform(call, [])
        schedule.succeeded(call)
        schedule.record_result(call, value)
        ended = schedule.ended()
    (call,) = schedule.calls([0])
    schedule.input_missing(call, (0, 0))
    ended, _ = drive(schedule)
    assert ended == [(0, None), *expected([1, 2])]


def test_replicas_that_differ_end_the_run():
    """The error names the block and both states; NaN equals itself."""
    for states, fits in (((float("nan"), float("nan")), True), ((1.0, 1.0 + 2**-52), False)):
        schedule = ReplicatedBlocks(todo=[0], present=[], program=rounds)
        for call, state in zip(schedule.calls([0, 1]), states, strict=True):
            value = {"parts": dict.fromkeys(call.command.parts), "state": float(state)}
            schedule.succeeded(call)
            if fits or call.worker == 0:
                schedule.record_result(call, value)
            else:
                with pytest.raises(
                    WorkerError, match=r"block 0, forward_dense, part 3-4: .* differ"
                ):
                    schedule.record_result(call, value)


def perform(program, give):
    """Rounds of a program whose results `give` returns, and the program's result."""
    asked = [next(program)]
    while True:
        try:
            asked.append(program.send(give(asked[-1])))
        except StopIteration as end:
            return asked, end.value


def walk(errors, **options):
    """Rounds of a block with these held-out errors, and its facts."""
    coming = iter(errors)
    given = {
        "forward_dense": lambda each: Found([(10, 5.0)] * each.parts, {}),
        "compensate": lambda each: Found([], {"linears": {"q": 1}}),
        "evaluate": lambda each: Found([(10, next(coming))], {"norm": 2.0}),
        "compute_gradients": lambda each: Found([((0.25,), 10)] * each.parts, {"norm": 2.0}),
        "forward_compressed": lambda each: Found([(10, 3.0)] * each.parts, {"norm": None}),
        "commit": lambda each: Found([each.command.facts], {}),
    }
    program = walk_block(
        3,
        5,
        is_committed=False,
        is_changed=True,
        compensates=True,
        refinement=RefineOptions(**options),
    )
    return perform(program, lambda each: given[each.command.method](each))


def test_a_block_is_trained_until_it_gets_no_better():
    """The state after the best epoch is kept before the next step; the last state is not."""
    options = {"epochs": 9, "batches": 2, "patience": 2, "slices": 8, "held_out": 0.2}
    asked, facts = walk([40.0, 30.0, 35.0, 32.0], **options)
    epoch = ["compute_gradients", "compute_gradients", "evaluate"]
    expected = [
        "forward_dense",
        "compensate",
        "evaluate",
        *epoch * 3,
        "forward_compressed",
        "commit",
    ]
    assert [each.command.method for each in asked] == expected
    steps = [each.command for each in asked if isinstance(each.command, ComputeGradients)]
    assert steps == [
        ComputeGradients(epoch=e, batch=b, keep=(e, b) == (1, 0))
        for e in range(3)
        for b in range(2)
    ]
    assert asked[-2].command == ForwardCompressed(keep=False)
    refined = facts["refinement"]
    assert (refined["best"], refined["stop"], refined["steps"]) == (1, "patience", 6)
    assert [each["held_out"] for each in refined["epochs"]] == [3.0, 3.5, 3.2]
    assert [each["gradient"] for each in refined["epochs"]] == [2.0] * 3
    assert (facts["before"], facts["after"], facts["linears"]) == (0.5, 0.3, {"q": 1})


def test_the_last_state_is_kept_where_it_is_the_best():
    """The round after the training keeps the last state if it is the best."""
    asked, facts = walk([40.0, 30.0, 20.0], epochs=2, batches=1, held_out=0.2)
    assert asked[-2].command == ForwardCompressed(keep=True)
    assert (facts["refinement"]["best"], facts["refinement"]["stop"]) == (2, "end")


@pytest.mark.parametrize(("slices", "parts"), [(1, [1, 1]), (2, [2, 2]), (3, [3, 2]), (8, [3, 2])])
def test_a_step_has_as_many_parts_as_are_allowed_and_it_has_chunks(slices, parts):
    """A step has at most as many parts as slices are allowed, and as it has chunks."""
    ledger = Ledger(6, RefineOptions(batches=2, slices=slices))
    assert [ledger.parts(batch) for batch in range(2)] == parts
