"""One run directory: recipe, status, journal, units and boundary chunks.

run.json       what was asked, of which model, with which versions
status.json    where it stands; replaced as a whole, readable when everything else is gone
events.jsonl   what happened, one line an event, appended (in a store see `journal`)
failures/      a record of each failure, with the log that explains it
hold.json      which driver is at work on it (see `hold`)
units/         work that is done (see `units`)
chunks/        boundary chunks of the pass at hand (see `chunks`)
"""

import math
import os
import reprlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, OrchestratorError
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import (
    digest_json,
    parse_json,
    read_bytes,
    remove_tree,
    write_json,
)
from orchestrator.store.journal import Journal
from orchestrator.store.lease import LEASE_FILE, Lease, is_alive, is_forsaken
from orchestrator.store.places import Place, Remote
from orchestrator.store.units import Units

STATUS_SECONDS = 1.0
"""How often a store is told of progress; of another state at once."""
_FORMAT_VERSION = 1
_MARKER = "run.json"
_STATUS = "status.json"
_FAILURES = "failures"
_NUMBERS = ("started", "updated", "done", "total", "left")
"""Fields of a status that are computed with."""


class RunDirectory:
    """A run directory at a place that the driver and every worker see."""

    def __init__(self, root: Place) -> None:
        self.root = root
        self.units = Units(root / "units")
        self.journal = Journal(root)
        self._guard = threading.RLock()
        self._written: tuple[object, float] = (None, 0.0)
        self._waiting: dict[str, Any] | None = None

    def chunks(self, pass_key: str, environment: Mapping[str, Any]) -> Chunks:
        """The boundary chunks of one pass in one environment; no others are mistaken for them."""
        return Chunks(self.root / "chunks" / digest_json([pass_key, dict(environment)])[:16])

    def hold(self) -> Lease:
        """What says that this driver is at work here; renewing it writes what has waited."""
        return Lease(self.root / LEASE_FILE, beat=self.flush)

    def claim(self, description: Mapping[str, Any]) -> None:
        """Makes the directory this run's, or takes it up again.

        Raises:
            InputError: It exists, is not empty and is no run directory.
        """
        self.check()
        write_json(self.root / _MARKER, {"format_version": _FORMAT_VERSION, **description})

    def check(self) -> None:
        """Raises InputError unless it is new, empty or a run directory; changes nothing."""
        if isinstance(self.root, Remote):
            self.root.check()
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root}: is a file; a run directory was expected")
        if not self.root.is_dir() or (self.root / _MARKER).exists():
            return
        if any(each.name != LEASE_FILE for each in self.root.iterdir()):
            raise InputError(
                f"{self.root}: holds files but no {_MARKER}, so it is no run directory; "
                "name another with --run-dir"
            )

    def description(self) -> dict[str, Any]:
        """What `claim` wrote.

        Raises:
            InputError: There is no run here, or one of an unknown format.
        """
        description = _read(self.root / _MARKER, "is no run directory")
        version = description.get("format_version")
        if type(version) is not int or version != _FORMAT_VERSION:
            raise InputError(
                f"{self.root / _MARKER}: format_version is {reprlib.repr(version)}, this program "
                f"reads {_FORMAT_VERSION}"
            )
        return description

    def write_status(self, **fields: Any) -> None:
        """Replaces the status; `pid`, `host` and `updated` (seconds since 1970) are added.

        In a store one of an unchanged state waits until the last one is a second old.
        """
        where = {"pid": os.getpid(), "host": socket.gethostname(), "updated": time.time()}
        with self._guard:
            self._waiting = {**where, **fields}
            state, written = self._written
            recent = state == fields.get("state") and time.monotonic() - written < STATUS_SECONDS
            if not (recent and isinstance(self.root, Remote)):
                self._write_status()
                if state != fields.get("state"):
                    self.journal.flush()

    def _write_status(self) -> None:
        if self._waiting is not None:
            write_json(self.root / _STATUS, self._waiting, durable=False)
            self._written = self._waiting.get("state"), time.monotonic()
            self._waiting = None

    def flush(self) -> None:
        """Writes the status and the events that have waited."""
        with self._guard:
            self._write_status()
        self.journal.flush()

    def status(self) -> dict[str, Any]:
        """The last status written; a running one whose process is gone says `lost`.

        On another host it is gone when its hold has not been renewed for long.

        Raises:
            InputError: There is no run here.
        """
        self.description()
        if not (self.root / _STATUS).exists():
            return {"state": "new"}
        status = _read(self.root / _STATUS, "has no readable status")
        numbers = [status[name] for name in _NUMBERS if name in status]
        if not isinstance(status.get("state"), str) or not all(map(_is_number, numbers)):
            raise InputError(
                f"{self.root / _STATUS}: is damaged; nothing is known of the run's state"
            )
        if status.get("state") == "running":
            here = status.get("host") == socket.gethostname()
            gone = not is_alive(status.get("pid")) if here else is_forsaken(self.root / LEASE_FILE)
            if gone:
                status["state"] = "lost"
        return status

    def append(self, event: Mapping[str, Any]) -> None:
        """Adds one event to the journal."""
        self.journal.append(event)

    def events(self) -> Iterator[dict[str, Any]]:
        """The events of the journal, in order."""
        return self.journal.events()

    def failures(self) -> int:
        """How many failures are on record."""
        root = self.root / _FAILURES
        return sum(1 for _ in root.iterdir()) if root.is_dir() else 0

    def record_failure(self, number: int, record: Mapping[str, Any]) -> str:
        """Files a failure away; gives the file's name within the run directory."""
        name = f"{_FAILURES}/{number:04d}.json"
        write_json(self.root / name, {"time": round(time.time(), 3), **record}, durable=False)
        return name

    def remove(self) -> None:
        """Removes the run directory, and nothing that is not one.

        Raises:
            InputError: There is no run here, or a link to one.
            OrchestratorError: Some of it cannot be removed.
        """
        self.description()
        if isinstance(self.root, Path) and self.root.is_symlink():
            raise InputError(
                f"{self.root}: is a link; name {self.root.resolve()}, where the run is"
            )
        remove_tree(self.root)
        if self.root.exists():
            raise OrchestratorError(f"{self.root}: not all of it can be removed; look what is left")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**53  # type: ignore[arg-type]


def _read(path: Place, otherwise: str) -> dict[str, Any]:
    try:
        value = parse_json(read_bytes(path))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: {otherwise}: there is no {path.name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, an object was expected")
    return value
