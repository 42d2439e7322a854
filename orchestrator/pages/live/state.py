"""State of a run, computed from the events of its journal alone: without files, clock or network.

`state_of(events)` is a function of the events; a `RunState` that receives the same events one by
one is equal. Events of unknown kinds, and fields with values of other types, have no effect.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from orchestrator.pages.happened import SHOWN_EVENTS, UNLISTED
from orchestrator.pages.live.losses import RunLosses

Level = Literal["earlier", "busy", "part", "done", "lost"]
"""Cell of a block: committed by an earlier run, in its last call, some of its units committed,
committed, or last call failed. A block without a cell has not been reached."""

CALIBRATED = "calibrated"
"""Row of blocks that all chunks have passed; the stage `calibrate` commits them decomposed."""
MOST_BLOCKS = 1024
"""Blocks from this number on are not shown: no model has them, but a damaged journal may."""
MOST_RATES = 13
"""Number of counts kept for the throughput: a minute of progress events."""
_PARTS = {"block": "blocks", "step": "steps"}
"""Names of several units, by the first word of the name of one."""
_BLOCK = re.compile(r"block (\d{1,6})\b(?!-)")


class Parts(NamedTuple):
    """Number of completed parts of a stage, of all, and the name of several of them."""

    done: int
    total: int
    of: str


@dataclass(slots=True)
class StageState:
    """Progress of one stage within the present run."""

    state: Literal["ahead", "running", "done"] = "ahead"
    since: float | None = None
    """Time of its last beginning, in seconds since 1970."""
    seconds: float = 0.0
    """Wall time of its completed passes."""
    units: Parts | None = None
    """Committed units."""
    fine: Parts | None = None
    """Parts of units, such as chunks, which are announced every few seconds."""
    fraction: float | None = None
    """Completed fraction by cost, as announced with them."""
    left: float | None = None
    """Remaining seconds, as last announced."""
    busy: float | None = None
    memory: Mapping[str, Any] | None = None
    """Peak memory of a worker, as in the status."""
    tokens_per_second: float | None = None
    counts: list[tuple[float, int]] = field(default_factory=list)
    """Times and numbers of completed parts, of the finest ones, the last ones."""

    @property
    def parts(self) -> Parts | None:
        """Parts to show: the finest ones of a stage at work, the units of one that is done."""
        finest, coarsest = self.fine or self.units, self.units or self.fine
        return coarsest if self.state == "done" else finest

    @property
    def share(self) -> float | None:
        """Completed fraction; None if unknown.

        Units may be more recent than their parts, and are never ahead of them.
        """
        if self.state == "done":
            return 1.0
        known = [
            parts.done / parts.total for parts in (self.fine, self.units) if parts and parts.total
        ]
        if self.fraction is not None:
            known = [self.fraction, *known[self.fine is not None :]]
        return min(max(known), 1.0) if known else None

    @property
    def rate(self) -> float | None:
        """Completed parts per second over the last counts; None before two of them."""
        if len(self.counts) < 2:
            return None
        (begun, first), (ended, last) = self.counts[0], self.counts[-1]
        return (last - first) / (ended - begun) if ended > begun and last > first else None

    def count(self, time: float, parts: Parts, *, is_fine: bool) -> None:
        """Record the number of completed parts; the rate begins anew with another kind of them."""
        if not is_fine:
            self.units = parts
        if self.fine is None or is_fine:
            is_other = is_fine and (self.fine is None or self.fine.of != parts.of)
            if is_other or (self.counts and parts.done < self.counts[-1][1]):
                self.counts = []
            self.counts = [*self.counts, (time, parts.done)][-MOST_RATES:]
        if is_fine:
            self.fine = parts


@dataclass(slots=True)
class PastRun:
    """Beginning and end of one run of the directory."""

    begun: float
    ended: float | None = None
    state: str = "running"
    exit_code: int | None = None
    error: str = ""
    stage: str = ""
    """Stage that it was in last."""


@dataclass(slots=True)
class WorkerState:
    """Worker that is present."""

    since: float
    doing: str = ""
    """Label of the block that it finishes; empty while chunks pass, and between calls."""
    units: dict[str, int] = field(default_factory=dict)
    """Number of units that it has committed alone, by stage."""
    committed: float | None = None
    """Time of the last one."""

    def rate(self, name: str, begun: float) -> float | None:
        """Units per second in a stage from its beginning to the last unit; None without one."""
        seconds = (self.committed or 0.0) - max(begun, self.since)
        return self.units[name] / seconds if self.units.get(name) and seconds > 0 else None


@dataclass(slots=True)
class RunState:
    """State after the events so far, of the last run in the journal."""

    events: int = 0
    """Number of events."""
    runs: list[PastRun] = field(default_factory=list)
    stages: dict[str, StageState] = field(default_factory=dict)
    within: list[str] = field(default_factory=list)
    """Stages that have begun and not ended, the innermost last."""
    ahead: list[str] = field(default_factory=list)
    """Names of all stages that are certain, in order."""
    blocks: int | None = None
    group: int = 1
    """Number of blocks that are decomposed as one."""
    linears: int | None = None
    cells: dict[str, dict[int, Level]] = field(default_factory=dict)
    """By stage (and `CALIBRATED`), the levels of its blocks."""
    losses: RunLosses = field(default_factory=RunLosses)
    workers: dict[tuple[str, int], WorkerState] = field(default_factory=dict)
    """Present workers, by node and process id."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Nodes that drain or are quarantined."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Failures of all runs, each event with the number of its run."""
    waiting: str = ""
    """The reason why nothing happens; empty while something does."""
    run_left: float | None = None
    told: list[dict[str, Any]] = field(default_factory=list)
    """Last events other than progress; equal ones in a row once, with `times`."""

    @property
    def stage(self) -> str:
        """Name of the stage at work, or of the last one."""
        return self.within[-1] if self.within else self.runs[-1].stage if self.runs else ""

    def take(self, event: Mapping[str, Any]) -> None:
        """Continue with one more event."""
        self.events += 1
        time = _number(event.get("time")) or 0.0
        self.waiting = ""
        match event:
            case {"event": "run"}:
                self._take_run(event, time)
            case {"event": "stage", "stage": str(name), "state": "begin"}:
                self._begin(name, time)
            case {"event": "stage", "stage": str(name), "state": "end"}:
                self._end(name, event)
            case {"event": "unit" | "progress", "stage": str(name)}:
                self._count(name, event, time)
            case {"event": "surveyed"}:
                self.blocks = min(_count(event.get("blocks")) or 0, MOST_BLOCKS) or self.blocks
                self.group = _count(event.get("group")) or 1
                self.linears = _count(event.get("linears"))
                names = event.get("stages")
                self.ahead = [str(each) for each in names] if isinstance(names, list) else []
            case {"event": "note", "stage": str(name)}:
                self._take_over(name, event)
            case {"event": "epoch", "stage": str(name)} if (block := _block_of(event)) is not None:
                self.losses.take_unit(name, block, event.get("losses"))
            case {"event": "snapshot"}:
                self.losses.take_snapshot(event)
            case {"event": "waiting"}:
                self.waiting = f"{event.get('for')}; available: {event.get('there')}"
            case _:
                self._take_workers(event, time)
        self._tell(event)

    def _take_run(self, event: Mapping[str, Any], time: float) -> None:
        if event.get("state") == "begin":
            self._begin_run(time)
        elif self.runs:
            last = self.runs[-1]
            last.state, last.ended = str(event.get("state")), time
            last.exit_code, last.error = _count(event.get("exit_code")), str(event.get("error", ""))
            self.within, self.workers, self.nodes = [], {}, {}

    def _begin_run(self, time: float) -> None:
        if self.runs and self.runs[-1].state == "running":
            # killed: nobody wrote its end
            self.runs[-1].state = "lost"
        self.runs.append(PastRun(begun=time))
        self.stages, self.within, self.ahead = {}, [], []
        self.cells, self.workers, self.nodes, self.run_left = {}, {}, {}, None
        self.losses.begin_run()

    def _begin(self, name: str, time: float) -> None:
        is_within = bool(self.runs) and self.runs[-1].state == "running"
        if not self.runs or (name == "survey" and (not is_within or name in self.stages)):
            # journals of earlier versions have no event of the run
            self._begin_run(time)
        stage = self.stages.setdefault(name, StageState())
        stage.state, stage.since = "running", time
        for worker in self.workers.values():
            worker.units.pop(name, None)
        self.within.append(name)
        self.runs[-1].stage = name

    def _end(self, name: str, event: Mapping[str, Any]) -> None:
        stage = self.stages.setdefault(name, StageState())
        stage.state, stage.since, stage.left = "done", None, None
        stage.seconds += _number(event.get("seconds")) or 0.0
        stage.busy = _number(event.get("busy"))
        memory = event.get("memory")
        stage.memory = memory if isinstance(memory, dict) else None
        if name in self.within:
            del self.within[self.within.index(name) :]
        cells = self.cells.get(name, {})
        self.cells[name] = {b: "done" if level == "part" else level for b, level in cells.items()}

    def _count(self, name: str, event: Mapping[str, Any], time: float) -> None:
        stage = self.stages.setdefault(name, StageState())
        is_fine = event["event"] == "progress"
        done, total = _count(event.get("done")), _count(event.get("total"))
        if done is not None and total is not None:
            named = str(event.get("unit")).partition(" ")[0]
            of = str(event.get("of", "units")) if is_fine else _PARTS.get(named, "units")
            stage.count(time, Parts(done, total, of), is_fine=is_fine)
        if is_fine:
            stage.fraction = _number(event.get("fraction"))
            stage.left = _number(event.get("left"))
            self.run_left = _number(event.get("run_left"))
            return
        stage.tokens_per_second = _number(event.get("tokens_per_second"))
        block = _block_of(event)
        if block is not None:
            is_whole = _BLOCK.match(str(event.get("unit"))) is not None
            self._mark(name, block, "done" if is_whole else "part")
            self.losses.take_unit(name, block, event.get("losses"))
        for worker in self.workers.values():
            if worker.doing == f"block {block}":
                worker.doing = ""
        if (who := _worker_of(event)) is not None:
            worker = self.workers.setdefault(who, WorkerState(since=stage.since or time))
            worker.units[name] = worker.units.get(name, 0) + 1
            worker.committed = time

    def _mark(self, name: str, block: int, level: Level) -> None:
        """Set the level of a block, in `calibrate` of its group."""
        end = block + (self.group if name == "calibrate" else 1)
        blocks = range(block, min(end, self.blocks or MOST_BLOCKS))
        self.cells.setdefault(name, {}).update(dict.fromkeys(blocks, level))
        if name == "calibrate" and level != "lost":
            calibrated: Level = "earlier" if level == "earlier" else "done"
            self.cells.setdefault(CALIBRATED, {}).update(dict.fromkeys(blocks, calibrated))

    def _take_over(self, name: str, event: Mapping[str, Any]) -> None:
        """Continue with results of an earlier run."""
        blocks = event.get("blocks")
        if isinstance(blocks, list):
            whole = [block for block in blocks if _count(block) is not None]
            for block in whole:
                self._mark(name, block, "earlier")
            self.losses.take_over(name, whole)
        if (step := _count(event.get("step"))) is not None:
            self.losses.go_on_from(step)

    def _take_workers(self, event: Mapping[str, Any], time: float) -> None:
        match event:
            case {"event": "workers", "workers": list(workers)}:
                for each in workers:
                    if (who := _worker_of(each)) is not None:
                        self.workers[who] = WorkerState(since=time)
            case {"event": "finishing", "block": int(block)}:
                self._mark(self.stage, block, "busy")
                if (who := _worker_of(event)) is not None:
                    present = self.workers.setdefault(who, WorkerState(since=time))
                    present.doing = f"block {block}"
            case {"event": "lost" | "failed" | "retired" | "returned" as kind}:
                if (who := _worker_of(event)) is not None:
                    self.workers.pop(who, None)
                if kind in ("lost", "failed"):
                    self.failures.append({**event, "run": len(self.runs)})
                    if (block_of := _block_of(event)) is not None:
                        self._mark(self.stage, block_of, "lost")
            case {"event": "draining", "node": str(node)}:
                self.nodes[node] = "drains"
            case {"event": "quarantined", "node": str(node)}:
                self.nodes[node] = "quarantined"

    def _tell(self, event: Mapping[str, Any]) -> None:
        if event.get("event") in UNLISTED or event.get("event") == "snapshot":
            return
        last = self.told[-1] if self.told else {}
        ignored = ("time", "times")
        if _without(last, *ignored) == _without(event, *ignored):
            last["times"] += 1
        else:
            self.told = [*self.told, {**event, "times": 1}][-SHOWN_EVENTS:]


def state_of(events: Iterable[Mapping[str, Any]]) -> RunState:
    """Compute the state of a run from the events of its journal, in order."""
    state = RunState()
    for event in events:
        state.take(event)
    return state


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _block_of(event: Mapping[str, Any]) -> int | None:
    """Block of a unit: its field, or the block that its name begins with."""
    if (block := _count(event.get("block"))) is not None:
        return block
    found = _BLOCK.match(str(event.get("unit")))
    return int(found[1]) if found else None


def _worker_of(event: object) -> tuple[str, int] | None:
    match event:
        case {"node": str(node), "pid": int(pid)}:
            return node, pid
    return None


def _number(value: object) -> float | None:
    """Convert to a finite number of a size that clocks and counts have."""
    is_number = type(value) in (int, float)
    return float(value) if is_number and abs(value) < 2**53 else None  # type: ignore[arg-type]


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None
