"""Events of a run as lines: plain text for people, JSON for programs.

Lines have no escape codes and no carriage returns, so that they look the same on a terminal, in a
file and in the logs of a Ray job.
"""

import json
import time
from collections.abc import Callable
from typing import TextIO

from orchestrator.events import Event
from orchestrator.readable import duration

SECONDS_BETWEEN_LINES = 1.0
"""Minimum time between lines of one stage: units that finish faster share a line."""


class Lines:
    """Writer of one line per event: time, stage, progress and remaining time."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._start = clock()
        # by stage, since stages may be nested: start time, and units seen
        self._stages: dict[str, tuple[float, int]] = {}
        self._last_line = float("-inf")

    def __call__(self, event: Event) -> None:
        text = self._unit(event) if event["event"] == "unit" else self._other(event)
        if text is not None:
            self._stream.write(f"[{duration(self._clock() - self._start)}] {text}\n")
            self._stream.flush()

    def _unit(self, event: Event) -> str | None:
        now, done, total = self._clock(), event["done"], event["total"]
        begun, seen = self._stages.get(event["stage"], (self._start, 0))
        self._stages[event["stage"]] = (begun, seen + 1)
        if done < total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return None
        self._last_line = now
        # Units reused from an earlier run took no time, so only those seen in this run count.
        left = (now - begun) / (seen + 1) * (total - done)
        unit = f": {event['unit']}" if "unit" in event else ""
        took = f" in {duration(event['seconds'])}" if "seconds" in event else ""
        eta = f", {duration(left)} left" if done < total else ""
        return f"{event['stage']} {done}/{total}{unit}{took}{eta}"

    def _other(self, event: Event) -> str:
        match event:
            case {"event": "stage", "state": "begin", "stage": stage}:
                self._stages[stage] = (self._clock(), 0)
                self._last_line = float("-inf")
                return str(stage)
            case {"event": "stage", "state": "end", "stage": stage}:
                busy = f", workers {event['busy']:.0%} busy" if "busy" in event else ""
                return f"{stage} done in {duration(event.get('seconds', 0.0))}{busy}"
            case {"event": "note", "text": text}:
                return str(text)
            case {"event": "waiting"}:
                return f"waiting for {event.get('for')}; available: {event.get('there')}"
            case {"event": "workers", "workers": workers}:
                return ", ".join(f"process {each['pid']} on {each['node']}" for each in workers)
            case {"event": "lost" | "failed", "record": record}:
                where = f"{event['unit']}: process {event['pid']} on {event['node']}"
                then = f"{event['decided']}, see {record}"
                return f"{where} {event['cause']}: {event['why']}; {then}"
            case {"event": "returned", "node": node, "pid": pid}:
                return f"process {pid} on {node} is returned: no work is left for it"
            case {"event": "draining", "node": node, "deadline": deadline}:
                left = max((deadline or 0.0) - time.time(), 0.0)
                when = f" in {duration(left)}" if deadline else ""
                return f"{node} drains{when}: its workers finish their calls, others take over"
        if event["event"] == "snapshot":
            train = "" if event["train"] is None else f"loss {event['train']:.4f} in training, "
            return f"step {event['step']}: {train}{event['held_out']:.4f} on held-out sequences"
        fields = ", ".join(f"{name} {value}" for name, value in event.items() if name != "event")
        return f"{event['event']}: {fields}"


class JsonLines:
    """Writer of one JSON object per line and event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        self._stream.write(json.dumps(dict(event), ensure_ascii=False) + "\n")
        self._stream.flush()
