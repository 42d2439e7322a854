"""Failure policy: what a history of failures means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InfeasibleError, UsageError, WorkerError
from orchestrator.runtime.deadline import VARIABLE, Deadlines
from orchestrator.runtime.policy import (
    Action,
    Cause,
    Failure,
    FailurePolicy,
    Status,
    check_nodes,
    decide,
)

DIED, HUNG, MEMORY = Cause.DIED, Cause.HUNG, Cause.OUT_OF_MEMORY
GONE, PREEMPTED = Cause.NODE_LOST, Cause.PREEMPTED


def failures(*words):
    """Failures from words: `a:x`: a worker died in unit a on node x; `a:x:hung`: it hung."""
    split = (word.split(":") for word in words)
    causes = {"": DIED, "hung": HUNG, "memory": MEMORY, "gone": GONE, "preempted": PREEMPTED}
    return tuple(
        Failure(unit, node, causes[cause[0] if cause else ""], f"why {n}")
        for n, (unit, node, *cause) in enumerate(split)
    )


ONE, TWO, THREE = {"x"}, {"x", "y"}, {"x", "y", "z"}
TABLE = {
    "a first failure": (["a:x"], TWO, Action.REPEAT),
    "again on the same node": (["a:x", "a:x"], TWO, Action.REPEAT),
    "on another node": (["a:x", "a:y"], TWO, Action.END),
    "in another way on another node": (["a:x:hung", "b:x", "a:y"], THREE, Action.END),
    "another unit on another node": (["a:x", "b:y"], TWO, Action.REPEAT),
    "twice on the only node": (["a:x", "a:x"], ONE, Action.REPEAT),
    "three times on the only node": (["a:x", "a:x", "a:x"], ONE, Action.END),
    "three units on one of two nodes": (["a:x", "b:x", "c:x"], TWO, Action.QUARANTINE),
    "one unit three times on one of two": (["a:x", "a:x", "a:x"], TWO, Action.QUARANTINE),
    "three units on the only node": (["a:x", "b:x", "c:x"], ONE, Action.REPEAT),
    "on a node that nobody may use": (["a:x", "b:x", "c:x"], {"y"}, Action.QUARANTINE),
    "preempted after another failure": (["a:x", "a:y:preempted"], TWO, Action.REPEAT),
    "a failure after being preempted": (["a:x:preempted", "a:y"], TWO, Action.REPEAT),
    "both nodes lost": (["a:x:gone", "a:y:gone"], TWO, Action.REPEAT),
    "a third node lost": (["a:x:gone", "a:y:gone", "a:z:gone"], THREE, Action.END),
    "a node lost, then a failure": (["a:x:gone", "a:y"], TWO, Action.REPEAT),
    "three units with their node": (["a:x:gone", "b:x:gone", "c:x:gone"], TWO, Action.REPEAT),
    "memory on two nodes": (["a:x:memory", "a:y:memory"], TWO, Action.END),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_a_failure_means(case):
    """The failures so far decide whether the unit, the node or neither is the cause."""
    words, nodes, action = TABLE[case]
    assert decide(Status(failures(*words), nodes)).action is action


def test_a_unit_that_fails_on_two_nodes_is_named_with_what_it_did():
    """The error names the nodes, the causes and the last reason."""
    error = decide(Status(failures("block 7:x:hung", "block 7:y"), TWO)).error
    assert isinstance(error, WorkerError)
    assert str(error).startswith("block 7: its worker hung on x and died on y, so the unit itself")
    assert "the last time: why 1; committed units stay" in str(error)


def test_out_of_memory_is_an_error_of_its_own():
    """The error is an InfeasibleError with a remedy."""
    error = decide(Status(failures(*["block 7:x:memory"] * 3), ONE)).error
    assert isinstance(error, InfeasibleError)
    assert "already was the smallest part: start fewer workers per node" in str(error)


def test_what_is_split_is_performed_again():
    """A split is repeated after any failures, and does not count against the parts."""
    status = Status(failures("a:x:memory", "a:y:memory"), TWO, is_split=True)
    assert decide(status).action is Action.SPLIT
    policy = FailurePolicy()
    failure = Failure("a", "x", MEMORY)
    actions = [policy.after_failure(failure, ONE, is_split=n == 0).action for n in range(4)]
    assert actions == [Action.SPLIT, Action.REPEAT, Action.REPEAT, Action.END]


def test_fifty_failures_end_a_stage():
    """The fiftieth failure ends the stage, whichever units and nodes failed."""
    policy = FailurePolicy()
    nodes = {f"node {n}" for n in range(60)}
    for n in range(49):
        after = policy.after_failure(Failure(f"block {n}", f"node {n}"), nodes)
        assert after.action is Action.REPEAT
    error = policy.after_failure(Failure("block 49", "node 49"), nodes).error
    assert "50 workers lost in one stage" in str(error)


FAILURES = st.lists(
    st.builds(
        Failure, st.sampled_from("abcde"), st.sampled_from(["x", "y", "z"]), st.sampled_from(Cause)
    ),
    min_size=1,
    max_size=12,
)
NODES = st.frozensets(st.sampled_from(["x", "y", "z"]), min_size=1)


@given(FAILURES, NODES)
def test_preemptions_count_for_nothing(history, nodes):
    """A preemption is always repeated, and other decisions do not depend on preemptions."""
    counted = [each for each in history if each.cause is not PREEMPTED]
    if history[-1].cause is PREEMPTED:
        assert decide(Status(tuple(history), nodes)).action is Action.REPEAT
    else:
        assert decide(Status(tuple(history), nodes)).action is (
            decide(Status(tuple(counted), nodes)).action
        )


@given(FAILURES, NODES)
def test_a_node_is_quarantined_only_if_there_is_another(history, nodes):
    """A quarantine needs three failures on the node that were not the loss of the node."""
    decision = decide(Status(tuple(history), nodes))
    if decision.action is Action.QUARANTINE:
        node = history[-1].node
        assert nodes - {node}
        assert sum(each.node == node and each.cause in (DIED, HUNG, MEMORY) for each in history) > 2
    assert (decision.error is not None) == (decision.action is Action.END)


@given(FAILURES, NODES)
def test_a_unit_ends_the_run_for_its_own_failures_alone(history, nodes):
    """Failures of other units do not make a unit end the run."""
    own = tuple(each for each in history if each.unit == history[-1].unit)
    ends = decide(Status(own, nodes)).action is Action.END
    if decide(Status(tuple(history), nodes)).action is Action.END:
        assert ends or decide(Status(own, nodes)).action is Action.QUARANTINE


def test_a_cluster_of_quarantined_nodes_ends_the_run():
    """No worker can start; with another node, or without a quarantine, one can."""
    check_nodes({"x"}, {"y"})
    check_nodes(set(), set())
    with pytest.raises(WorkerError, match="all nodes are quarantined: x, y"):
        check_nodes(set(), {"y", "x"})


def test_a_deadline_is_ten_times_the_longest_call(monkeypatch):
    """The deadline follows the longest call of the same method, and is never below the floor,
    which is higher for methods that are known to be slow; the environment can set it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    deadlines = Deadlines()
    assert deadlines.of("step") == 1800
    for seconds in (200.0, 300.0, 100.0):
        deadlines.note("step", seconds)
    assert (deadlines.of("step"), deadlines.of("finish")) == (3000, 1800)
    patient = Deadlines({"finish": 7200.0})
    assert (patient.of("step"), patient.of("finish")) == (1800, 7200)
    monkeypatch.setenv(VARIABLE, "2.5")
    assert Deadlines({"step": 7200.0}).of("step") == 2.5
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(UsageError, match=rf"{VARIABLE} is '{wrong}'"):
            Deadlines()


def test_an_input_that_vanishes_again_and_again_ends_the_run():
    """The third miss of the same input ends the run."""
    policy = FailurePolicy()
    decisions = [policy.after_missing("blocks 2-3, chunk 1") for _ in range(3)]
    assert [each.action for each in decisions] == [Action.REPEAT, Action.REPEAT, Action.END]
    assert isinstance(decisions[-1].error, WorkerError)
    assert "check that all nodes share the run directory" in str(decisions[-1].error)
    assert policy.after_missing("blocks 2-3, chunk 2").action is Action.REPEAT
