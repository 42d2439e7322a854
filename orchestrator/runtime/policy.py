"""Decisions on failed calls: pure functions of a status, so that they are tested without a cluster.

Rules, in this order:

- A loss by the drain or preemption of a node counts against neither unit nor node.
- A call that ran out of memory, and whose state is held in smaller parts from now on, is repeated.
- A unit whose worker died, hung or ran out of memory on two different nodes is itself the cause and
  ends the run.
- After three such failures a node is quarantined, if another one is available.
- A unit that has failed three times, on whatever nodes, ends the run, and so do fifty failures.

The loss of a whole node counts for the last rule only: it is no evidence against the unit, nor
against a node that will be used again. An exception of a call ends the run without a decision here,
because any worker would raise it again, unless it is one of memory or of a GPU (`losses`).
"""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.errors import InfeasibleError, OrchestratorError, WorkerError

FAILURES_A_RUN = 50
FAILURES_A_UNIT = 3
FAILURES_A_NODE = 3
NODES_A_UNIT = 2
MISSES_A_UNIT = 3


class Cause(StrEnum):
    """Cause of the loss of a call's worker."""

    DIED = "died"
    HUNG = "hung"
    OUT_OF_MEMORY = "ran out of memory"
    NODE_LOST = "lost its node"
    PREEMPTED = "was preempted"


OWN = {Cause.DIED, Cause.HUNG, Cause.OUT_OF_MEMORY}
"""Causes that lie with the unit or with the node; a repetition elsewhere tells which."""


class Action(StrEnum):
    """Answer to a failure."""

    REPEAT = "repeat"
    SPLIT = "repeat in smaller parts"
    QUARANTINE = "repeat and quarantine the node"
    END = "end the run"


@dataclass(frozen=True, slots=True)
class Failure:
    """Call that failed with the loss of its worker."""

    unit: str
    node: str
    cause: Cause = Cause.DIED
    why: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Numbers of failures that end a run, end it by a unit, or quarantine a node."""

    run: int = FAILURES_A_RUN
    unit: int = FAILURES_A_UNIT
    node: int = FAILURES_A_NODE
    nodes: int = NODES_A_UNIT


@dataclass(frozen=True, slots=True)
class Status:
    """Facts on which a decision is made."""

    failures: tuple[Failure, ...]
    """All failures so far, the new one last."""
    nodes: Set[str]
    """Nodes that can hold a worker: neither draining nor quarantined."""
    is_split: bool = False
    """True if the call's state is held in smaller parts from now on."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Action, and the error if the run is to end."""

    action: Action
    error: OrchestratorError | None = None


def decide(status: Status, limits: Limits = Limits()) -> Decision:
    """Decide on the last failure; see the module for the rules."""
    last = status.failures[-1]
    if last.cause is Cause.PREEMPTED:
        return Decision(Action.REPEAT)
    if status.is_split:
        return Decision(Action.SPLIT)
    counted = [each for each in status.failures if each.cause is not Cause.PREEMPTED]
    of_unit = [each for each in counted if each.unit == last.unit]
    nodes = {each.node: each for each in of_unit if each.cause in OWN}
    if len(nodes) >= limits.nodes:
        where = " and ".join(f"{each.cause} on {each.node}" for each in nodes.values())
        return _end(last, f"its worker {where}, so the unit itself is taken to be the cause")
    here = [each for each in counted if each.node == last.node and each.cause in OWN]
    if last.cause in OWN and len(here) >= limits.node and status.nodes - {last.node}:
        return Decision(Action.QUARANTINE)
    if len(of_unit) >= limits.unit:
        most = limits.unit - 1
        return _end(last, f"lost its worker {len(of_unit)} times, at most {most} are repeated")
    if len(counted) >= limits.run:
        error = WorkerError(
            f"{len(counted)} workers lost in one stage, at most {limits.run - 1} are replaced; "
            f"the last time: {last.why}; committed units stay, the same command resumes"
        )
        return Decision(Action.END, error)
    return Decision(Action.REPEAT)


def _end(last: Failure, what: str) -> Decision:
    """Decision to end the run because of one unit, with the reason of its last failure."""
    said = f"{last.unit}: {what}; the last time: {last.why}; "
    if last.cause is Cause.OUT_OF_MEMORY:
        remedy = "it already was the smallest part: start fewer workers per node, or add "
        error: OrchestratorError = InfeasibleError(
            f"{said}{remedy}nodes with more memory; committed units stay, the same command resumes"
        )
    else:
        error = WorkerError(f"{said}committed units stay")
    return Decision(Action.END, error)


def check_nodes(nodes: Set[str], quarantined: Set[str]) -> None:
    """Raise WorkerError if every node that could hold a worker is quarantined."""
    if quarantined and not nodes:
        raise WorkerError(
            f"all nodes are quarantined: {', '.join(sorted(quarantined))}; see the run's failures, "
            "repair or replace the nodes, then run the same command again"
        )


class FailurePolicy:
    """Record of the failures of a stage, with a decision on each."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._failures: tuple[Failure, ...] = ()
        self._misses: Counter[str] = Counter()

    def after_failure(
        self, failure: Failure, nodes: Set[str], *, is_split: bool = False
    ) -> Decision:
        """Record a failure and decide on it.

        A failure that is answered by smaller parts is not counted.
        """
        failures = (*self._failures, failure)
        decision = decide(Status(failures, nodes, is_split), self._limits)
        if decision.action is not Action.SPLIT:
            self._failures = failures
        return decision

    def after_missing(self, unit: str) -> Decision:
        """Record that the input of a call is missing or damaged, and decide what follows.

        The decision is to repeat the call, or to end the run if the input was missing
        `MISSES_A_UNIT` times.
        """
        self._misses[unit] += 1
        if self._misses[unit] < MISSES_A_UNIT:
            return Decision(Action.REPEAT)
        error = WorkerError(
            f"{unit}: its input was made {self._misses[unit] - 1} times and is missing or damaged "
            "again; check that all nodes share the run directory and that its disk keeps what is "
            "written"
        )
        return Decision(Action.END, error)
