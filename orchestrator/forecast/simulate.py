"""A run without tensors: the real schedules and the real failure policy, on a clock that jumps.

What is simulated is who does what when. How long a call takes follows from what it computes, reads
and writes (`forecast.work`) at a machine's rates; nodes are lost by chance, drawn from a seed, and
others come in their place. The dispatch loop, the schedules and the policy are those of a run.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from orchestrator.forecast.costs import Costs
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.work import Work
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.runtime.calls import Call, IndependentCalls, Schedule
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import Cause, FailurePolicy
from orchestrator.runtime.pool import Outcome, WorkerLocation
from orchestrator.runtime.shard_pass import ShardPass

GPUS_A_NODE = 8
"""That are lost together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came of one stage, or of a whole run."""

    seconds: float
    busy_seconds: float
    """Of all workers, at calls that ended."""
    worker_seconds: float
    """Of all workers that were there."""
    calls: int
    repeated: int
    """Calls that were performed more than once."""
    units: int
    """Blocks finished, linears pivoted, or files written."""
    redone: int
    """Of them more than once."""
    lost_nodes: int
    bytes_moved: float

    @property
    def utilisation(self) -> float:
        return self.busy_seconds / self.worker_seconds if self.worker_seconds else 0.0


class SimulatedPool:
    """Workers of which each performs its calls in no time, while the clock says otherwise.

    Args:
        take: Seconds of a call.
        loss_hours: Mean hours until a node is lost; nothing, and none ever is.
        start_seconds: Until another worker is there in the place of a lost one.
    """

    def __init__(
        self,
        workers: int,
        take: Callable[[Call], float],
        *,
        start_seconds: float,
        loss_hours: float | None = None,
        seed: int = 0,
        node_size: int = GPUS_A_NODE,
    ) -> None:
        self.now = self.busy_seconds = 0.0
        self.lost_nodes = 0
        self._take, self._start_seconds = take, start_seconds
        self._loss_seconds = None if loss_hours is None else 3600 * loss_hours
        self._rng, self._serial = random.Random(seed), itertools.count()
        self._count, self._node_size = workers, node_size
        self._node_of = {worker: worker // node_size for worker in range(workers)}
        self._there = dict.fromkeys(range(workers), True)
        self._running: dict[int, tuple[Call, float, int]] = {}
        self._events: list[tuple[float, int, str, int]] = []
        self._fresh = workers
        self._next_node = -(-workers // node_size)
        for node in range(self._next_node):
            self._await_loss(node)

    def _at(self, when: float, kind: str, who: int) -> int:
        serial = next(self._serial)
        heapq.heappush(self._events, (when, serial, kind, who))
        return serial

    def _await_loss(self, node: int) -> None:
        if self._loss_seconds is not None:
            self._at(self.now + self._rng.expovariate(1 / self._loss_seconds), "loss", node)

    def workers(self) -> Sequence[int]:
        return [worker for worker, is_there in self._there.items() if is_there]

    def location(self, worker: int) -> WorkerLocation:
        return WorkerLocation(f"node {self._node_of[worker]}", worker)

    def start(self, call: Call, record: Any) -> None:
        if self._node_of[call.worker] < 0:
            # its node went while it was idle, which shows now
            serial = self._at(self.now, "dead", call.worker)
        else:
            serial = self._at(self.now + self._take(call), "done", call.worker)
        self._running[call.worker] = (call, self.now, serial)

    def wait(self, seconds: float) -> list[Outcome]:
        """What happens next, whenever that is."""
        while self._events:
            self.now, serial, kind, who = heapq.heappop(self._events)
            if kind in ("done", "dead"):
                if who not in self._running or self._running[who][2] != serial:
                    continue
                call, begun, _ = self._running.pop(who)
                if kind == "dead":
                    return [self._gone(call)]
                self.busy_seconds += self.now - begun
                return [Outcome(call)]
            if kind == "come":
                self._there[who] = True
                return []
            return self._lose(who)
        raise AssertionError("nothing is to come, and the schedule is not finished")

    def _lose(self, node: int) -> list[Outcome]:
        there = [worker for worker, where in self._node_of.items() if where == node]
        if not there:
            return []
        self.lost_nodes += 1
        for worker in there:
            self._node_of[worker] = -1
        return [self._gone(self._running.pop(w)[0]) for w in there if w in self._running]

    def _gone(self, call: Call) -> Outcome:
        return Outcome(call, lost="its node is gone", cause=Cause.PREEMPTED)

    def replace(self, worker: int) -> None:
        self._there.pop(worker, None)
        self._node_of.pop(worker, None)
        fresh = self._fresh
        self._fresh += 1
        if (fresh - self._count) % self._node_size == 0:
            self._next_node += 1
            self._await_loss(self._next_node - 1)
        self._node_of[fresh], self._there[fresh] = self._next_node - 1, False
        self._at(self.now + self._start_seconds, "come", fresh)

    def turn_to(self, worker_class: type, task: Any) -> None:
        """Nothing is held from task to task."""

    def gather(self) -> list[dict[str, Any]]:
        return []

    def abandon(self, call: Call, why: str) -> list[Outcome]:
        raise AssertionError("a simulated call never hangs")

    def is_growing(self) -> bool:
        return False

    def scale(self, max_workers: int) -> int:
        return 0

    def give_back(self, worker: int) -> None:
        raise AssertionError("nobody is given back")

    def leaving(self) -> Sequence[int]:
        return []

    def quarantine(self, node: str) -> None:
        raise AssertionError("a node that is gone is not at fault")

    def nodes(self) -> Set[str]:
        return {f"node {node}" for node in set(self._node_of.values()) if node >= 0}

    def quarantined(self) -> Set[str]:
        return frozenset()

    def describe(self) -> str:
        return f"{len(self.workers())} simulated workers"


def simulate(
    costs: Costs,
    rates: Rates,
    workers: int,
    *,
    blocks_a_shard: int = 2,
    loss_hours: float | None = None,
    seed: int = 0,
) -> dict[str, Simulated]:
    """The stages of a closed-form compression, each from its own beginning; seconds add up.

    Args:
        costs: What its calls compute, read and write.
        loss_hours: Mean hours until a node of `GPUS_A_NODE` workers is lost.
    """
    shards = default_shards(costs.num_blocks, workers, blocks_a_shard)
    cut = cut_blocks(costs.num_blocks, shards)
    everything = set(range(costs.sequences))
    stages: dict[str, tuple[Schedule, Callable[[Call], Work]]] = {}
    if costs.labels:
        boundaries = ShardPass(
            cut[:-1] or cut,
            todo=(),
            num_chunks=costs.sequences,
            present=[set() for _ in cut[:-1] or cut],
            results=set() if len(cut) > 1 else everything,
            keeps=[blocks.start for blocks in cut],
        )
        stages["boundaries"] = boundaries, _passing(costs, boundaries)
    gathering = ShardPass(
        cut[::-1] if costs.labels else cut,
        todo=range(costs.num_blocks),
        num_chunks=costs.sequences * max(costs.labels, 1),
        present=[set() for _ in cut],
        backward=costs.labels > 0,
    )
    stages["calibrate"] = gathering, _passing(costs, gathering)
    if costs.recipe.refine == "blocks":
        blocks = [(f"block {block}, refine", (block,)) for block in range(costs.num_blocks)]
        stages["refine"] = IndependentCalls("refine", blocks), lambda call: costs.refine()
    if costs.pivots:
        linears = [(f"linear {number}", (number,)) for number in range(len(costs.pivots))]
        stages["pivot"] = (
            IndependentCalls("pivot", linears),
            lambda call: costs.pivots[call.arguments[0]],
        )
    files = [(f"file {number}", (number,)) for number in range(costs.files)]
    stages["write"] = IndependentCalls("write", files), lambda call: costs.file()
    return {
        name: _perform(
            schedule,
            work,
            rates,
            workers,
            loss_hours=loss_hours,
            seed=seed * len(stages) + place,
        )
        for place, (name, (schedule, work)) in enumerate(stages.items())
    }


def _passing(costs: Costs, schedule: ShardPass) -> Callable[[Call], Work]:
    """What a call of a pass takes, by the shard that it is of."""
    gathers = any(state.todo for state in schedule.shards)

    def work(call: Call) -> Work:
        state = schedule.shards[call.shard]
        blocks = len(state.blocks)
        if call.method == "open":
            return costs.load(blocks)
        if call.method == "finish":
            return costs.finish()
        found = costs.gather(blocks) if gathers else costs.forward(blocks)
        if gathers and costs.labels:
            # the dense pass left the shard's inputs; behind the last block are the labels
            found += costs.comes() if state.blocks.start else Work()
            if state.blocks.stop == costs.num_blocks:
                return found + costs.head() + costs.goes()
        found += costs.comes() if state.entry else Work()
        return found + costs.goes() if call.emits is not None else found

    return work


def _perform(
    schedule: Schedule,
    work: Callable[[Call], Work],
    rates: Rates,
    workers: int,
    *,
    loss_hours: float | None,
    seed: int,
) -> Simulated:
    moved = 0.0
    performed: dict[str, int] = {}
    # others would be idle from the first moment to the last
    useful = min(workers, schedule.max_workers)

    def take(call: Call) -> float:
        nonlocal moved
        found = work(call)
        moved += found.network
        return found.overlapped(rates) if isinstance(schedule, ShardPass) else found.seconds(rates)

    pool = SimulatedPool(useful, take, start_seconds=rates.start, loss_hours=loss_hours, seed=seed)

    def on_success(call: Call, value: Any) -> None:
        performed[call.label] = performed.get(call.label, 0) + 1
        if isinstance(schedule, ShardPass):
            schedule.drop_inputs()

    dispatch(
        pool,
        schedule,
        FailurePolicy(),
        on_success=on_success,
        on_event=_ignore,
    )
    units = {label: count for label, count in performed.items() if _is_unit(label)}
    return Simulated(
        seconds=pool.now,
        busy_seconds=pool.busy_seconds,
        worker_seconds=workers * pool.now,
        calls=sum(performed.values()),
        repeated=sum(n - 1 for n in performed.values()),
        units=len(units),
        redone=sum(n - 1 for n in units.values()),
        lost_nodes=pool.lost_nodes,
        bytes_moved=moved,
    )


def _is_unit(label: str) -> bool:
    """Whether a call of this name commits one: a chunk passed or a shard opened is none."""
    return not label.startswith("block") or label.endswith(("finish", "refine"))


def _ignore(event: Mapping[str, Any]) -> None:
    """Nobody is told."""
