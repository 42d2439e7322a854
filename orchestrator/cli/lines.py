"""Events of a run as lines: plain text for people, JSON for programs.

Lines have no escape codes and no carriage returns, so that they look the same on a terminal, in a
file and in the logs of a Ray job.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

from orchestrator.cli.sentences import progress_text, sentence, stage_text
from orchestrator.events import Event
from orchestrator.readable import duration

SECONDS_BETWEEN_LINES = 1.0
"""Minimum time between lines of one stage: units that finish faster share a line."""
SILENT_SECONDS = 8.0
"""Time after the last line at which progress is said; less than ten by a beat and a delay."""
BEAT_SECONDS = 1.0


class Lines:
    """Writer of one line per event: time, stage, progress and remaining time.

    As a context manager it also says what the program is doing if no event comes for a time.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._start = self._written = clock()
        self._guard = threading.RLock()
        # by stage, since stages may be nested: start time, and units seen
        self._stages: dict[str, tuple[float, int]] = {}
        self._within: list[str] = []
        self._last_unit = float("-inf")
        self._progress: Event | None = None
        self._doing, self._since = "", self._start
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._beat, name="lines", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.remind()

    def remind(self) -> None:
        """Write the present activity after a time without a line."""
        with self._guard:
            if self._clock() - self._written <= SILENT_SECONDS:
                return
            if self._progress is not None:
                self._write(progress_text(self._progress))
            elif self._doing:
                self._write(f"{self._doing}, for {duration(self._clock() - self._since)}")

    def __call__(self, event: Event) -> None:
        with self._guard:
            text = self._text(event)
            if text is not None:
                self._write(text)

    def _write(self, text: str) -> None:
        self._written = self._clock()
        self._stream.write(f"[{duration(self._written - self._start)}] {text}\n")
        self._stream.flush()

    def _text(self, event: Event) -> str | None:
        match event:
            case {"event": "unit"}:
                return self._unit(event)
            case {"event": "progress"}:
                is_first = self._progress is None
                self._progress = event
                due = is_first or self._clock() - self._written > SILENT_SECONDS
                return progress_text(event) if due else None
            case {"event": "stage", "state": "begin", "stage": stage}:
                self._within.append(stage)
                self._stages[stage] = (self._clock(), 0)
                self._last_unit, self._progress = float("-inf"), None
                self._do(stage_text(stage))
            case {"event": "stage", "state": "end", "stage": stage}:
                self._within = [each for each in self._within if each != stage]
                self._progress = None
                self._do(
                    stage_text(self._within[-1]) if self._within else "preparing the next stage"
                )
            case {"event": "note", "text": text, "activity": True}:
                self._do(re.split(r": |\n", str(text))[0])  # without a cause, which was said
        return sentence(event)

    def _do(self, what: str) -> None:
        self._doing, self._since = what, self._clock()

    def _unit(self, event: Event) -> str | None:
        now, done, total = self._clock(), event["done"], event["total"]
        begun, seen = self._stages.get(event["stage"], (self._start, 0))
        self._stages[event["stage"]] = (begun, seen + 1)
        if done < total and now - self._last_unit < SECONDS_BETWEEN_LINES:
            return None
        self._last_unit = now
        unit = f": {event['unit']}" if "unit" in event else ""
        took = f" in {duration(event['seconds'])}" if "seconds" in event else ""
        # units reused from an earlier run took no time, so only those seen in this run count
        left: Any = (now - begun) / (seen + 1) * (total - done)
        if self._progress is not None and self._progress["stage"] == event["stage"]:
            left = self._progress["left"]
        eta = f", {duration(left)} left" if done < total and left is not None else ""
        return f"{stage_text(event['stage'])} {done}/{total}{unit}{took}{eta}"


class JsonLines:
    """Writer of one JSON object per line and event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._guard = stream, threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave the stream as it is."""

    def __call__(self, event: Event) -> None:
        # progress comes from another thread
        with self._guard:
            self._stream.write(json.dumps(dict(event), ensure_ascii=False) + "\n")
            self._stream.flush()
