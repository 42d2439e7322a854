"""Journal of a run: one line of JSON per event.

On local disk it is events.jsonl; every event is appended by a single write. Objects of a store
cannot be appended to, so events are buffered for some seconds and written as numbered objects,
`events/<number>-<driver>.jsonl`, which in order contain the same lines. If a driver is killed, the
events of its last seconds are lost; no unit depends on them.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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
            yield from _parsed(content)

    def _segments(self) -> list[Place]:
        return _segments(self._root)


class News(NamedTuple):
    """Events that a journal has got since it was read last."""

    begins_anew: bool
    """True if it is another journal than before: all events read so far are of a removed one."""
    events: list[dict[str, Any]]


class JournalTail:
    """Reader of a journal that grows. Each `read` returns the events since the one before.

    A file is read from the end of its last complete line, and of a store only new objects. A
    journal that does not exist yet is empty.
    """

    def __init__(self, root: Place) -> None:
        self._root = root
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._names: set[str] = set()

    def read(self) -> News:
        """Read the new events.

        Raises:
            OSError: The disk fails. A later call returns what this one has not.
            OrchestratorError: The store does not respond. As above.
        """
        if isinstance(self._root, Remote):
            return self._read_segments()
        try:
            with (self._root / _FILE).open("rb") as file:
                found = os.fstat(file.fileno())
                identity = found.st_dev, found.st_ino
                is_same = identity == self._file and found.st_size >= self._offset
                begins_anew = self._file is not None and not is_same
                self._file, self._offset = identity, self._offset if is_same else 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            begins_anew, self._file, self._offset = self._file is not None, None, 0
            return News(begins_anew, [])
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return News(begins_anew, list(_parsed(whole)))

    def _read_segments(self) -> News:
        segments = {each.name: each for each in _segments(self._root)}
        begins_anew = not self._names <= segments.keys()
        known = set() if begins_anew else self._names
        added = {name: each for name, each in segments.items() if name not in known}
        events = [event for each in added.values() for event in _parsed(read_bytes(each))]
        self._names = known | added.keys()
        return News(begins_anew, events)


def _segments(root: Place) -> list[Place]:
    """List the objects of a journal in a store, in order."""
    found: list[Place] = [*(root / _SEGMENTS).iterdir()]
    return sorted(found, key=lambda each: each.name)


def _parsed(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events of complete lines; other lines are skipped."""
    for line in content.decode("utf-8", errors="replace").split("\n"):
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
