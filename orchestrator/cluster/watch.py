"""A run as others see it: status, journal, events, and what a signal does to it."""

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from orchestrator.cluster.signals import Signals
from orchestrator.errors import OrchestratorError, StoppedError
from orchestrator.store.run import RunDirectory

Event = dict[str, Any]
OnEvent = Callable[[Event], None]


class Watch:
    """Keeps the status of a run true from its start to its end, whatever the end is.

    As a context manager it writes `running` on entry and, on exit, `done`, `failed` with the error
    and its exit code, or `stopped` with 75. SIGTERM and SIGINT write `stopped, 75` at once, then
    interrupt the program where it stands, and leave as `StoppedError`.
    """

    def __init__(self, run: RunDirectory, on_event: OnEvent | None, **fields: Any) -> None:
        self._run = run
        self._on_event = on_event
        self._status: dict[str, Any] = {**fields, "state": "running", "started": time.time()}
        self._lock = threading.Lock()
        self.signals = Signals(lambda name: self._write_stopped())
        self.seconds: dict[str, float] = {}
        """Wall time by stage."""

    def __enter__(self) -> "Watch":
        self._write()
        self.signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.signals.__exit__()
        if error is None:
            self._write(state="done", exit_code=0)
        elif self.signals.received is not None:
            self._write_stopped()
            raise StoppedError(
                f"stopped by {self.signals.received}; what is committed stays, "
                "the same command resumes"
            ) from error
        elif isinstance(error, StoppedError | KeyboardInterrupt):
            self._write_stopped()
        else:
            code = error.exit_code if isinstance(error, OrchestratorError) else 1
            said = str(error) or type(error).__name__
            self._write(state="failed", exit_code=code, error=said)

    def _write_stopped(self) -> None:
        self._write(state="stopped", exit_code=StoppedError.exit_code)

    def _write(self, **fields: Any) -> None:
        with self._lock:
            self._status.update(fields)
            self._run.write_status(**self._status)

    def stage(self, name: str) -> "Stage":
        """A stage of the run; its begin, end and wall time are recorded."""
        return Stage(self, name)

    def event(self, event: Mapping[str, Any]) -> None:
        """Adds an event to the journal, shows it in the status, and passes it on.

        Raises:
            KeyboardInterrupt: A signal came, and what it raised was caught by somebody.
        """
        self.signals.check()
        self._run.append(event)
        if event["event"] in ("stage", "unit"):
            shown = {name: event[name] for name in ("stage", "done", "total") if name in event}
            self._write(**shown)
        if self._on_event is not None:
            self._on_event(dict(event))

    def note(self, text: str) -> None:
        self.event({"event": "note", "text": text})


class Stage:
    """One verb of the driver while it is at work."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch = watch
        self.name = name
        self._begun = 0.0

    def __enter__(self) -> "Stage":
        self._begun = time.monotonic()
        self._watch.event({"event": "stage", "stage": self.name, "state": "begin"})
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        seconds = time.monotonic() - self._begun
        self._watch.seconds[self.name] = self._watch.seconds.get(self.name, 0.0) + seconds
        if error is None:
            ended = {"event": "stage", "stage": self.name, "state": "end", "seconds": seconds}
            self._watch.event(ended)

    def progress(self, done: int, total: int, **facts: Any) -> None:
        """One more unit of `total` is done."""
        event = {"event": "unit", "stage": self.name, "done": done, "total": total, **facts}
        self._watch.event(event)
