"""Simulation of a run without tensors: the real schedules and failure policy on a simulated clock.

The simulation covers which worker does what when. The duration of a call follows from its FLOPs and
bytes (`forecast.work`) at a machine's rates; nodes are lost at random times, drawn from a seed, and
replaced. The dispatch loop, the schedules and the failure policy are those of a run.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.forecast.costs import Costs
from orchestrator.forecast.fixed.stages import stage_costs
from orchestrator.forecast.forecast import costs_of
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.room import Room
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Setting
from orchestrator.forecast.work import Work
from orchestrator.plan.cut import cut_blocks, default_shards
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve
from orchestrator.runtime.calls import Call, Command, Finish, IndependentCalls, Open, Schedule
from orchestrator.runtime.dispatch import dispatch
from orchestrator.runtime.policy import Cause, FailurePolicy
from orchestrator.runtime.pool import FixedPool, NodeSet, Outcome, WorkerLocation
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stage_names import CALIBRATE

GPUS_A_NODE = 8
"""Workers of a node; they are lost together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Result of the simulation of one phase."""

    stage: str
    """The stage of the run that it is part of."""
    seconds: float
    busy_seconds: float
    """Time in calls that ended, of all workers together."""
    worker_seconds: float
    """Time that workers existed, of all workers together."""
    calls: int
    repeated: int
    """Executions of a call after its first one."""
    units: int
    """Units committed: blocks finished, linears pivoted, or files written."""
    redone: int
    """Executions of a unit after its first one."""
    lost_nodes: int
    bytes_moved: float

    @property
    def utilisation(self) -> float:
        return self.busy_seconds / self.worker_seconds if self.worker_seconds else 0.0


@dataclass(frozen=True, slots=True)
class Simulate(Command):
    """Make a unit that no other one depends on."""

    method: ClassVar[str] = "simulate"

    unit: int


class SimulatedPool(FixedPool):
    """Workers whose calls take no time, on a clock that jumps to the next event.

    Args:
        take: Seconds of a call.
        loss_hours: Mean hours until a node is lost; None: no node is lost.
        start_seconds: Seconds until the replacement of a lost worker is ready.
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
        self._next_node = -(-workers // node_size)
        super().__init__(NodeSet({f"node {node}" for node in range(self._next_node)}))
        self.now = self.busy_seconds = 0.0
        self.lost_nodes = 0
        self._take, self._start_seconds = take, start_seconds
        self._loss_seconds = None if loss_hours is None else 3600 * loss_hours
        self._rng, self._serial = random.Random(seed), itertools.count()
        self._count, self._node_size = workers, node_size
        self._node_of = {worker: worker // node_size for worker in range(workers)}
        self._ready = {worker: self._location(worker) for worker in range(workers)}
        self._running: dict[int, tuple[Call, float, int]] = {}
        self._events: list[tuple[float, int, str, int]] = []
        self._fresh = workers
        for node in range(self._next_node):
            self._await_loss(node)

    def _at(self, when: float, kind: str, who: int) -> int:
        serial = next(self._serial)
        heapq.heappush(self._events, (when, serial, kind, who))
        return serial

    def _await_loss(self, node: int) -> None:
        if self._loss_seconds is not None:
            self._at(self.now + self._rng.expovariate(1 / self._loss_seconds), "loss", node)

    def _location(self, worker: int) -> WorkerLocation:
        return WorkerLocation(f"node {self._node_of[worker]}", worker)

    def workers(self) -> Mapping[int, WorkerLocation]:
        return dict(self._ready)

    def start(self, call: Call, record: Any) -> None:
        if self._node_of[call.worker] < 0:
            # its node was lost while it was idle, which is noticed now
            serial = self._at(self.now, "dead", call.worker)
        else:
            serial = self._at(self.now + self._take(call), "done", call.worker)
        self._running[call.worker] = (call, self.now, serial)

    def wait(self, seconds: float) -> list[Outcome]:
        """Advance the clock to the next event."""
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
                self._ready[who] = self._location(who)
                return []
            return self._lose(who)
        raise AssertionError("no event is left, and the schedule is not finished")

    def _lose(self, node: int) -> list[Outcome]:
        there = [worker for worker, where in self._node_of.items() if where == node]
        if not there:
            return []
        self.lost_nodes += 1
        self.nodes.names.discard(f"node {node}")
        for worker in there:
            self._node_of[worker] = -1
            if worker in self._ready:
                self._ready[worker] = self._location(worker)
        return [self._gone(self._running.pop(w)[0]) for w in there if w in self._running]

    def _gone(self, call: Call) -> Outcome:
        return Outcome(call, lost="its node was lost", cause=Cause.PREEMPTED)

    def replace(self, worker: int) -> None:
        self._ready.pop(worker, None)
        self._node_of.pop(worker, None)
        fresh = self._fresh
        self._fresh += 1
        if (fresh - self._count) % self._node_size == 0:
            self._next_node += 1
            self._await_loss(self._next_node - 1)
            self.nodes.names.add(f"node {self._next_node - 1}")
        self._node_of[fresh] = self._next_node - 1
        self._at(self.now + self._start_seconds, "come", fresh)


@dataclass(frozen=True, slots=True)
class Phase:
    """A schedule of a run, and the work of its calls."""

    stage: str
    """The stage of the run that it is part of."""
    schedule: Schedule
    work: Callable[[Call], Work]


def simulate(
    shapes: Shapes,
    recipe: Recipe,
    rates: Rates,
    workers: int,
    *,
    blocks_a_shard: int = 2,
    loss_hours: float | None = None,
    seed: int = 0,
) -> dict[str, Simulated]:
    """Simulate the phases of a compression, each from its own start; their seconds add up.

    Of the stages after calibration those are simulated whose calls are independent of each other.

    Args:
        loss_hours: Mean hours until a node of `GPUS_A_NODE` workers is lost; None: no losses.

    Raises:
        UsageError: As `forecast`.
    """
    resolved = resolve(recipe)
    costs = costs_of(shapes, resolved)
    cut = cut_blocks(costs.num_blocks, default_shards(costs.num_blocks, workers, blocks_a_shard))
    setting = Setting(
        costs=costs,
        room=Room(None, is_gpu=False),
        rates=(rates,),
        workers=workers,
        shards=len(cut),
    )
    phases = _calibration(costs, cut)
    for name, cost in stage_costs(setting, resolved).items():
        if calls := cost.calls():
            phases[name] = _independent(name, calls)
    return {
        name: _perform(
            phase,
            rates,
            workers,
            loss_hours=loss_hours,
            seed=seed * len(phases) + place,
        )
        for place, (name, phase) in enumerate(phases.items())
    }


def _calibration(costs: Costs, cut: Sequence[range]) -> dict[str, Phase]:
    """Passes of all chunks: one that leaves them at boundaries for gradients, and the last one."""
    phases = {}
    if costs.label_draws:
        boundaries = ShardPass(
            cut[:-1] or cut,
            todo=(),
            num_chunks=costs.sequences,
            present=[set() for _ in cut[:-1] or cut],
            results=set() if len(cut) > 1 else set(range(costs.sequences)),
            keeps=[blocks.start for blocks in cut],
        )
        phases["boundaries"] = Phase(CALIBRATE, boundaries, _passing(costs, boundaries))
    gathering = ShardPass(
        cut[::-1] if costs.label_draws else cut,
        todo=range(costs.num_blocks),
        num_chunks=costs.sequences * max(costs.label_draws, 1),
        present=[set() for _ in cut],
        backward=costs.label_draws > 0,
    )
    return {**phases, CALIBRATE: Phase(CALIBRATE, gathering, _passing(costs, gathering))}


def _independent(stage: str, calls: Sequence[Work]) -> Phase:
    """Phase of calls that do not depend on each other."""
    labelled = [(f"{stage} {unit}", Simulate(unit)) for unit in range(len(calls))]

    def work(call: Call) -> Work:
        assert isinstance(call.command, Simulate)
        return calls[call.command.unit]

    return Phase(stage, IndependentCalls(labelled), work)


def _passing(costs: Costs, schedule: ShardPass) -> Callable[[Call], Work]:
    """Cost of a call of a pass, as a function of its shard."""
    gathers = any(state.todo for state in schedule.shards)

    def work(call: Call) -> Work:
        state = schedule.shards[call.shard]
        blocks = len(state.blocks)
        if isinstance(call.command, Open):
            return costs.load(blocks)
        if isinstance(call.command, Finish):
            return costs.finish()
        found = costs.gather(blocks) if gathers else costs.forward(blocks)
        if gathers and costs.label_draws:
            # the dense pass stored the shard's inputs; the last block's gradient is of the labels
            found += costs.comes() if state.blocks.start else Work()
            if state.blocks.stop == costs.num_blocks:
                return found + costs.head() + costs.goes()
        found += costs.comes() if state.entry else Work()
        return found + costs.goes() if call.emits is not None else found

    return work


def _perform(
    phase: Phase,
    rates: Rates,
    workers: int,
    *,
    loss_hours: float | None,
    seed: int,
) -> Simulated:
    moved, schedule = 0.0, phase.schedule
    performed: dict[str, int] = {}
    # more workers would be idle all the time
    useful = min(workers, schedule.max_workers)

    def take(call: Call) -> float:
        nonlocal moved
        found = phase.work(call)
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
    # steps and opened shards commit no unit
    is_pass = isinstance(schedule, ShardPass)
    units = {
        label: count
        for label, count in performed.items()
        if not is_pass or label.endswith("finish")
    }
    return Simulated(
        stage=phase.stage,
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


def _ignore(event: Mapping[str, Any]) -> None:
    """No-op event handler."""
