"""Status, journal and events of a run, and its reaction to signals."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from orchestrator.errors import (
    InfeasibleError,
    InputError,
    OrchestratorError,
    StoppedError,
    UsageError,
)
from orchestrator.events import JOURNAL_ONLY, OnEvent
from orchestrator.progress.tally import Ahead, Tally
from orchestrator.runtime.progress import Progress
from orchestrator.runtime.signals import Signals
from orchestrator.store.lease import Lease, removed
from orchestrator.store.run import RunDirectory
from orchestrator.usage import Usage

Event = dict[str, Any]
Follower = Callable[[Event, Mapping[str, Any]], None]
"""Function of an event and of the status after it."""
_STOPPED: dict[str, Any] = {"state": "stopped", "exit_code": StoppedError.exit_code}
MOST_NAMED = 16
"""Number of workers up to which the status names each; of more, their nodes."""
JOURNAL_SECONDS = 5.0
"""Minimum interval between progress events in the journal."""


class RunMonitor:
    """Keeps the status of a run up to date from its start to its end, however it ends.

    The context manager writes `running` on entry and, on exit, `done`, `failed` with the error and
    its exit code, or `stopped` with 75. SIGTERM and SIGINT write `stopped, 75` at once, interrupt
    the program, and leave the context as `StoppedError`. The status of a run that another driver
    has taken over is not written. A run that is refused before its work begins leaves the status of
    the run before it, as it leaves the description.
    """

    def __init__(self, run: RunDirectory, on_event: OnEvent | None, **fields: Any) -> None:
        self._run = run
        self._on_event = on_event
        self._status: dict[str, Any] = {**fields, "state": "running", "started": time.time()}
        self._lock = threading.Lock()
        self._begun: dict[str, tuple[float, int]] = {}
        self._journalled = float("-inf")
        self.progress = Progress(self._report_progress, self._present)
        self._workers: set[tuple[str, int]] = set()
        self._done_by: Counter[tuple[str, int]] = Counter()
        self._failures = run.failures()
        self._followers: list[Follower] = []
        self._holds: list[Lease] = []
        self.signals = Signals(lambda name: self._write(**_STOPPED))
        self.seconds: dict[str, float] = {}
        """Wall time by stage."""
        self.made_elsewhere: list[dict[str, Any]] = []
        """Stages with reused units of another environment: their number, and the environment."""
        self.most_workers = 1
        """Largest number of workers at the same time."""
        self.within: list[str] = []
        """Stages that have begun and not ended, the innermost last."""
        self._busy: dict[str, tuple[float, float]] = {}
        self.memory: dict[str, Usage] = {}
        """Peak memory of a worker, by stage."""

    @property
    def busy(self) -> dict[str, float]:
        """By stage, the fraction of the workers' time that they spent in calls."""
        return {stage: part / of for stage, (part, of) in self._busy.items() if of}

    def __enter__(self) -> "RunMonitor":
        self._write()
        self._run.append({"event": "run", "state": "begin"})
        self.signals.__enter__()
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()
        self.signals.__exit__()
        with self._lock:
            self._status |= dict.fromkeys(("left", "run_left"))
            if error is None:
                self._status["progress"] = None
        if error is None:
            self._end(state="done", exit_code=0)
        elif self.signals.received is not None:
            self._end(**_STOPPED)
            raise StoppedError(
                f"stopped by {self.signals.received}; what is committed stays, "
                "the same command resumes"
            ) from error
        elif isinstance(error, StoppedError | KeyboardInterrupt):
            self._end(**_STOPPED)
        else:
            code = error.exit_code if isinstance(error, OrchestratorError) else 1
            said = str(error) or type(error).__name__
            is_refusal = isinstance(error, UsageError | InfeasibleError | InputError)
            self._end(is_refusal=is_refusal, state="failed", exit_code=code, error=said)

    def _is_removed(self, hold: Lease) -> bool:
        """True for the lease of the run directory after its removal; an output is another one."""
        return hold.is_removed and hold.place.parent == self._run.root

    @property
    def _is_lost(self) -> bool:
        """True if another driver has taken over the run, or it was removed."""
        return any(hold.taken_by or self._is_removed(hold) for hold in self._holds)

    def _write(self, **fields: Any) -> None:
        """Update the status, unless another driver has taken over the run, or it was removed."""
        if self._is_lost:
            return
        with self._lock:
            self._status.update(fields)
            known = {name: value for name, value in self._status.items() if value is not None}
            self._run.write_status(**known)

    def _end(self, *, is_refusal: bool = False, **fields: Any) -> None:
        """Record the end in the journal first, so that a final status means a whole journal."""
        if not self._is_lost:
            # the journal is information; a full disk must not hide the error of the run
            with suppress(OSError, OrchestratorError):
                self._run.append({"event": "run", **fields})
            if is_refusal and self._run.restore_status():
                return
        self._write(**fields)

    def add_made_elsewhere(self, stage: str, units: int, environment: Mapping[str, Any]) -> None:
        """Add to the report's count of a stage's units from another environment."""
        about = {"stage": stage, "environment": dict(environment)}
        for entry in self.made_elsewhere:
            if about.items() <= entry.items():
                entry["units"] += units
                return
        self.made_elsewhere.append(about | {"units": units})

    def guard(self, hold: Lease) -> None:
        """Announce the previous holder of a lease; the run ends if another driver takes it over."""
        if hold.note is not None:
            self.note(hold.note)
        self._holds.append(hold)

    def _present(self) -> str:
        """Name of the present stage, or ""."""
        return self.within[-1] if self.within else ""

    def tally(self, ahead: Ahead | None = None) -> Tally:
        """Tally of the next dispatch of the present stage (see `Progress.tally`)."""
        return self.progress.tally(self._present(), ahead)

    def _report_progress(self, event: Event) -> None:
        """Write progress to the status and, every few seconds, to the journal; pass it on."""
        most = self.memory.get(event["stage"])
        event |= {
            "workers": len(self._workers) or 1,
            "failures": self._failures,
            "memory": most.to_json() if most is not None else None,
        }
        names = ("done", "total", "of", "fraction")
        self._write(
            progress={name: event[name] for name in names},
            left=event["left"],
            run_left=event["run_left"],
        )
        now = time.monotonic()
        if now - self._journalled > JOURNAL_SECONDS:
            self._journalled = now
            self._run.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def stage(self, name: str) -> "StageMonitor":
        """Context of a stage of the run, with events for its begin and end."""
        return StageMonitor(self, name)

    def event(self, event: Mapping[str, Any]) -> None:
        """Write an event to the journal and the status, and pass it on.

        Utilisation is kept for the end of the stage, and memory for the status. `polled` is only an
        occasion for the checks.

        Raises:
            KeyboardInterrupt: A signal was received, and its exception was swallowed.
            StoppedError: Another driver works on the run or on its output.
            OrchestratorError: The run directory or the output was removed.
        """
        self.signals.check()
        self.progress.check()
        for hold in self._holds:
            if hold.taken_by is not None:
                raise StoppedError(
                    f"{hold.taken_by} has taken over {hold.place.parent}, because this process "
                    "did not renew its lease; committed units stay, and that driver continues"
                )
            if hold.is_removed:
                raise self._run.removed() if self._is_removed(hold) else removed(hold.place.parent)
        if event["event"] == "polled":
            return
        if event["event"] == "busy":
            stage = self._present()
            seconds, of = self._busy.get(stage, (0.0, 0.0))
            self._busy[stage] = seconds + event["seconds"], of + event["of"]
            return
        if event["event"] == "memory":
            self._note_memory(Usage.from_json(event))
            return
        if "log" in event:
            event = self._recorded(event)
        self._run.append(event)
        if event["event"] in JOURNAL_ONLY:
            return
        if (shown := self._shown(event)) is not None:
            self._write(**shown)
        for follow in self._followers:
            follow(dict(event), self._status)
        if self._on_event is not None:
            self._on_event(dict(event))

    @contextmanager
    def followed(self, follower: Follower) -> Iterator[None]:
        """Pass events to one more follower inside the context."""
        self._followers.append(follower)
        try:
            yield
        finally:
            self._followers.remove(follower)

    def _note_memory(self, usage: Usage) -> None:
        """Update the peak memory of a stage; the next change of the status shows it."""
        stage = self._present()
        most = self.memory[stage] = usage.merge(self.memory.get(stage, usage))
        with self._lock:
            self._status["memory"] = most.to_json()

    def _recorded(self, event: Mapping[str, Any]) -> Event:
        """Write a failure with its log to a file; the event then names the file."""
        self._failures += 1
        record = self._run.record_failure(self._failures, event)
        return {name: value for name, value in event.items() if name != "log"} | {"record": record}

    def _shown(self, event: Mapping[str, Any]) -> Event | None:
        """Changes of the status by an event; None if it changes nothing."""
        match event:
            case {"event": "stage", "state": "begin", "stage": stage}:
                self._begun[stage] = (time.monotonic(), 0)
                self._done_by.clear()
                fresh = ("done", "total", "progress", "left", "run_left", "done_by")
                return {"stage": stage, **dict.fromkeys(fresh)}
            case {"event": "stage" | "unit", "stage": stage}:
                return {"stage": stage, **self._progress(event)}
            case {"event": "workers", "workers": workers}:
                self._workers |= {(each["node"], each["pid"]) for each in workers}
            case {"event": "lost" | "retired" | "returned", "node": node, "pid": pid}:
                self._workers.discard((node, pid))
            case {"event": "failed"}:
                pass
            case _:
                return None
        self.most_workers = max(self.most_workers, len(self._workers))
        nodes = {node for node, _ in self._workers}
        there = {"workers": len(self._workers) or None, "nodes": len(nodes) or None}
        return {**there, "failures": self._failures}

    def _progress(self, event: Mapping[str, Any]) -> Event:
        """Done and total units, and the seconds for the remaining ones at the same rate."""
        if event["event"] != "unit":
            return {}
        begun, seen = self._begun.get(event["stage"], (time.monotonic(), 0))
        self._begun[event["stage"]] = (begun, seen + 1)
        done, total = event["done"], event["total"]
        found = {"done": done, "total": total}
        if "pid" in event:
            self._done_by[event["node"], event["pid"]] += 1
            found["done_by"] = _named(self._done_by)
        if self._status.get("progress") is None:
            found["left"] = (time.monotonic() - begun) / (seen + 1) * (total - done)
        return found

    def dismiss_workers(self) -> None:
        """Remove the workers from the status; others may start later."""
        self._workers.clear()
        with self._lock:
            self._status |= dict.fromkeys(("workers", "nodes", "left", "run_left"))

    def note(self, text: str, **facts: Any) -> None:
        self.event({"event": "note", "text": text, **facts})


def _named(units: Mapping[tuple[str, int], int]) -> dict[str, int]:
    """Numbers of units by worker, or by node if there are many workers."""
    found: Counter[str] = Counter()
    for (node, pid), count in sorted(units.items()):
        found[f"process {pid} on {node}" if len(units) <= MOST_NAMED else node] += count
    return dict(found)


class StageMonitor:
    """Context of one stage of the driver."""

    def __init__(self, monitor: RunMonitor, name: str) -> None:
        self._monitor = monitor
        self.name = name
        self._begun = 0.0

    def __enter__(self) -> "StageMonitor":
        self._begun = time.monotonic()
        self._monitor.within.append(self.name)
        self._monitor.event({"event": "stage", "stage": self.name, "state": "begin"})
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._monitor.within.pop()
        self._monitor.progress.end(self.name)
        seconds = time.monotonic() - self._begun
        self._monitor.seconds[self.name] = self._monitor.seconds.get(self.name, 0.0) + seconds
        if error is None:
            ended = {"event": "stage", "stage": self.name, "state": "end", "seconds": seconds}
            if self.name in self._monitor.busy:
                ended["busy"] = self._monitor.busy[self.name]
            if self.name in self._monitor.memory:
                ended["memory"] = self._monitor.memory[self.name].to_json()
            self._monitor.event(ended)

    def progress(self, done: int, total: int, **facts: Any) -> None:
        """Announce that one more unit of `total` is done."""
        event = {"event": "unit", "stage": self.name, "done": done, "total": total, **facts}
        self._monitor.event(event)
