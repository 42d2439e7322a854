"""Trackers of a run: events and results go to each; a failure of one is a warning."""

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from orchestrator.errors import StoppedError, UsageError
from orchestrator.events import OnEvent
from orchestrator.tracking.base import TrackedRun, Tracker
from orchestrator.tracking.figures import SeriesPoint, of_event, of_report

TRACKERS = {
    "mlflow": "MlflowTracker",
    "tensorboard": "TensorboardTracker",
    "trackio": "TrackioTracker",
    "wandb": "WandbTracker",
}
"""Class of each tracker, in the module of its name."""
POINT_SECONDS = 1.0
"""Minimum time between points about the progress of one stage, except for its last one."""


class Following:
    """Trackers that follow one run."""

    def __init__(self, classes: Mapping[str, type[Tracker]], run: TrackedRun, say: OnEvent) -> None:
        self._say = say
        self._last: dict[str, float] = {}
        self._trackers: dict[str, Tracker] = {}
        for name, made in classes.items():
            with self._warned(name, "start"), _quiet():
                self._trackers[name] = made(run)

    def on_event(self, event: dict[str, Any]) -> None:
        """Pass an event on, and log its figures."""
        self._say(event)
        if event.get("event") == "unit" and event["done"] != event["total"]:
            now = time.monotonic()
            if now - self._last.get(event["stage"], float("-inf")) < POINT_SECONDS:
                return
            self._last[event["stage"]] = now
        self._log(of_event(event))

    def report(self, report: Mapping[str, Any]) -> None:
        """Log the figures of a result."""
        self._log(of_report(report))

    def end(self, state: str) -> None:
        for name, tracker in self._trackers.items():
            with self._warned(name, "end"), _quiet():
                tracker.end(state)

    def _log(self, points: Iterator[SeriesPoint]) -> None:
        if not self._trackers:
            return
        for point in points:
            for name, tracker in [*self._trackers.items()] if point.values else ():
                with self._warned(name, "continue"), _quiet():
                    tracker.log(*point)

    @contextmanager
    def _warned(self, name: str, verb: str) -> Iterator[None]:
        """Convert a failure to one warning, after which the tracker gets nothing more."""
        try:
            yield
        except Exception as error:  # of a foreign library, or of its server
            self._trackers = {n: each for n, each in self._trackers.items() if n != name}
            said = (str(error).strip().splitlines() or [""])[0][:200]
            why = f"{type(error).__name__}: {said}" if said else type(error).__name__
            text = f"warning: {name} cannot {verb} tracking, the run goes on without: {why}"
            self._say({"event": "note", "text": text})


@contextmanager
def following(
    names: Sequence[str], directory: str, settings: Mapping[str, Any], say: OnEvent
) -> Iterator[Following]:
    """Follow a run with the named trackers; they end with it.

    A run that is resumed from the same directory is continued, if the library can.

    Args:
        names: Keys of `TRACKERS`, each at most once.
        directory: The run directory; its name is that of the tracked run.
        settings: Fields of the recipe or of the evaluation.
        say: Callback for the events, and for warnings about trackers as notes.

    Raises:
        UsageError: A tracker is unknown, or its package is not installed; nothing has begun.
    """
    classes = {name: _class(name) for name in dict.fromkeys(names)}
    is_remote = "://" in directory
    place = directory if is_remote else str(Path(directory).expanduser().absolute())
    run = TrackedRun(
        name=place.rstrip("/").rpartition("/")[2],
        place=place,
        beside=str(Path.cwd() if is_remote else Path(place).parent),
        settings=settings,
    )
    found = Following(classes, run, say)
    state = "failed"
    try:
        yield found
        state = "done"
    except (KeyboardInterrupt, StoppedError):
        state = "stopped"
        raise
    finally:
        found.end(state)


def _class(name: str) -> type[Tracker]:
    if name not in TRACKERS:
        raise UsageError(f"track is {name!r}; it must be one of {', '.join(TRACKERS)}")
    try:
        module = importlib.import_module(f"orchestrator.tracking.{name}")
    except ImportError as error:
        raise UsageError(
            f"track: {name} is not installed; pip install 'orchestrator[{name}]'"
        ) from error
    made: type[Tracker] = getattr(module, TRACKERS[name])
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop lines that a library prints: stdout is for the result, stderr for events."""
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        yield
