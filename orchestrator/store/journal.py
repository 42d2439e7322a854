"""Journal of a run: one line of JSON per event.

On local disk it is events.jsonl; every event is appended by a single write. Objects of a store
cannot be appended to, so events are buffered for some seconds and written as numbered objects,
`events/<number>-<driver>.jsonl`, which in order contain the same lines. If a driver is killed, the
events of its last seconds are lost; no unit depends on them.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.store.files import parse_json, read_bytes, write_whole
from orchestrator.store.places import Place, Remote

FLUSH_SECONDS = 5.0
"""Time for which events are buffered if the file system cannot append."""
_FILE = "events.jsonl"
_SEGMENTS = "events"


class Journal:
    """Events of one run directory; written by its driver only."""

    def __init__(self, root: Place) -> None:
        self._root = root
        self._driver = uuid.uuid4().hex[:8]
        self._next: int | None = None
        self._lines: list[str] = []
        self._flushed = time.monotonic()
        self._guard = threading.RLock()

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event, immediately or with those of the next seconds."""
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False) + "\n"
        if isinstance(self._root, Remote):
            with self._guard:
                self._lines.append(line)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()
            return
        with (self._root / _FILE).open("a", encoding="utf-8") as file:
            file.write(line)

    def flush(self) -> None:
        """Write the buffered events."""
        with self._guard:
            if not self._lines:
                return
            if self._next is None:
                names = [each.name for each in self._segments()]
                self._next = int(names[-1].partition("-")[0]) + 1 if names else 0
            text = "".join(self._lines)
            place = self._root / _SEGMENTS / f"{self._next:08d}-{self._driver}.jsonl"
            write_whole(place, lambda file: file.write_text(text, encoding="utf-8"))
            self._lines, self._next, self._flushed = [], self._next + 1, time.monotonic()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all events in order; skips a line left incomplete by a crash."""
        files = self._segments() if isinstance(self._root, Remote) else [self._root / _FILE]
        for file in files:
            try:
                content = read_bytes(file)
            except OSError:
                continue
            for line in content.decode("utf-8", errors="replace").splitlines():
                try:
                    event = parse_json(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event

    def _segments(self) -> list[Place]:
        found: list[Place] = [*(self._root / _SEGMENTS).iterdir()]
        return sorted(found, key=lambda each: each.name)
