"""Run directory: recipe, status, journal, units and boundary chunks.

run.json       recipe, model and versions
status.json    state and progress; replaced atomically, readable after the cluster is gone
events.jsonl   journal, one line per event, appended (for a store see `journal`)
failures/      one record per failure, with its log
outputs.json   finished outputs, in the order in which they were written
hold.json      lease of the driver (see `lease`)
units/         committed units (see `units`)
chunks/        boundary chunks of the current pass (see `chunks`)
"""

import math
import os
import reprlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.store.chunks import Chunks
from orchestrator.store.cleaning import Cleaning, remove_content, sort_content
from orchestrator.store.files import (
    digest_json,
    is_missing,
    parse_json,
    read_bytes,
    write_json,
    write_whole,
)
from orchestrator.store.journal import Journal
from orchestrator.store.lease import LEASE_FILE, Lease, is_alive, is_forsaken
from orchestrator.store.places import Place, Remote, check_creatable
from orchestrator.store.units import Units

CANDIDATES = ".search"
"""Suffix of the directory of a search's candidates, beside its output."""
STATUS_SECONDS = 1.0
"""Minimum interval between status updates in a store; changes of state are written at once."""
_FORMAT_VERSION = 1
_MARKER = "run.json"
_STATUS = "status.json"
_FAILURES = "failures"
_OUTPUTS = "outputs.json"
REMAINS_SECONDS = 0.0, 1.0
"""Waits before each removal of remains: killed workers may complete a write."""
_NUMBERS = ("started", "updated", "done", "total", "left", "run_left")
"""Numeric fields of a status."""


class RunDirectory:
    """Run directory at a place that the driver and every worker can access."""

    def __init__(self, root: Place) -> None:
        self.root = root
        self.units = Units(root / "units")
        self.journal = Journal(root)
        self.marker = root / _MARKER
        """File that makes it a run directory; written by `claim` only."""
        self._claimed = self._has_earlier = False
        self._earlier_status: bytes | None = None
        self._guard = threading.RLock()
        self._written: tuple[object, float] = (None, 0.0)
        self._waiting: dict[str, Any] | None = None

    def chunks(self, pass_key: str, environment: Mapping[str, Any]) -> Chunks:
        """Return the boundary chunks of one pass in one environment, separate from all others."""
        return Chunks(self.root / "chunks" / digest_json([pass_key, dict(environment)])[:16])

    def lease(self) -> Lease:
        """Return the lease of this directory; its renewal also writes buffered status and
        events."""
        return Lease(self.root / LEASE_FILE, beat=self.flush)

    def claim(self, description: Mapping[str, Any], *, keeps_earlier: bool = False) -> None:
        """Create the run directory, or open it to resume; a second call replaces the description.

        Args:
            keeps_earlier: True to leave the description of an earlier run as it is, until a call
                replaces it, so that a refused run changes no file (see `restore_status`).

        Raises:
            InputError: The directory is not empty and not a run directory.
            OrchestratorError: It was removed since the first call.
        """
        if self._claimed and self.is_removed():
            raise self.removed()
        self.check()
        if not self._claimed:
            self._has_earlier = self.marker.exists()
            if keeps_earlier and self._has_earlier:
                with suppress(FileNotFoundError):
                    self._earlier_status = read_bytes(self.root / _STATUS)
        if not (keeps_earlier and self._has_earlier):
            write_json(self.marker, {"format_version": _FORMAT_VERSION, **description})
            self._has_earlier = False
        self._claimed = True

    def is_removed(self) -> bool:
        """Return True if the directory, once claimed, is no run directory any more."""
        return is_missing(self.marker)

    def removed(self) -> OrchestratorError:
        """Return the error for a directory that was removed under its driver."""
        return OrchestratorError(
            f"{self.root}: was removed or renamed while this run was using it; repeat the command "
            "to begin anew, or give its new name with --run-dir"
        )

    def check(self) -> None:
        """Raise InputError unless it is new, empty or a run directory; does not change the disk."""
        if isinstance(self.root, Remote):
            self.root.check()
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root}: is a file, not a run directory")
        if not self.root.exists():
            check_creatable(self.root)
        if not self.root.is_dir() or self.marker.exists():
            return
        if any(not each.name.startswith(LEASE_FILE) for each in self.root.iterdir()):
            raise InputError(
                f"{self.root}: contains files but no {_MARKER}, so it is not a run directory; "
                "name another with --run-dir"
            )

    def description(self) -> dict[str, Any]:
        """Return the description that `claim` wrote.

        Raises:
            InputError: The directory has no run, or one of an unknown format.
        """
        if isinstance(self.root, Path) and self.root.is_file():
            raise InputError(f"{self.root}: is a file, not a run directory")
        description = _read(self.marker, "is not a run directory")
        version = description.get("format_version")
        if type(version) is not int or version != _FORMAT_VERSION:
            raise InputError(
                f"{self.marker}: format_version is {reprlib.repr(version)}, this program "
                f"reads {_FORMAT_VERSION}"
            )
        return description

    def write_status(self, **fields: Any) -> None:
        """Replace the status; `pid`, `host` and `updated` (seconds since 1970) are added.

        In a store, a status of unchanged state waits until the last one is a second old.
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

    def restore_status(self) -> bool:
        """Write the status of the earlier run again, if the directory still has its description.

        Returns:
            False if there is no earlier status, or a call of `claim` has replaced the description.
        """
        earlier = self._earlier_status
        if earlier is None or not self._has_earlier:
            return False
        with self._guard:
            self._waiting = None
            write_whole(self.root / _STATUS, lambda file: file.write_bytes(earlier), durable=False)
        return True

    def _write_status(self) -> None:
        if self._waiting is not None:
            write_json(self.root / _STATUS, self._waiting, durable=False)
            self._written = self._waiting.get("state"), time.monotonic()
            self._waiting = None

    def flush(self) -> None:
        """Write the buffered status and events."""
        with self._guard:
            self._write_status()
        self.journal.flush()

    def status(self) -> dict[str, Any]:
        """Return the last status; its state is `lost` if it was running and its process has ended.

        A process on another host counts as ended if its lease has not been renewed for long.

        Raises:
            InputError: The directory has no run.
        """
        self.description()
        if not (self.root / _STATUS).exists():
            return {"state": "new"}
        status = _read(self.root / _STATUS, "has no readable status")
        numbers = [status[name] for name in _NUMBERS if name in status]
        is_sound = isinstance(status.get("state"), str) and all(map(_is_number, numbers))
        if not (is_sound and _is_progress(status.get("progress"), status.get("stage"))):
            raise InputError(f"{self.root / _STATUS}: is damaged; the state of the run is unknown")
        if status.get("state") == "running":
            here = status.get("host") == socket.gethostname()
            gone = not is_alive(status.get("pid")) if here else is_forsaken(self.root / LEASE_FILE)
            if gone:
                status["state"] = "lost"
        return status

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event to the journal."""
        self.journal.append(event)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the journal, in order."""
        return self.journal.events()

    def failures(self) -> int:
        """Number of recorded failures."""
        root = self.root / _FAILURES
        return sum(1 for _ in root.iterdir()) if root.is_dir() else 0

    def record_failure(self, number: int, record: Mapping[str, Any]) -> str:
        """Store a failure record; returns its file name within the run directory."""
        name = f"{_FAILURES}/{number:04d}.json"
        write_json(self.root / name, {"time": round(time.time(), 3), **record}, durable=False)
        return name

    def record_output(self, out: Place, facts: Mapping[str, Any]) -> None:
        """Add a finished output, or replace its entry."""
        others = [entry for entry in self.outputs() if entry["out"] != str(out)]
        entry = {"out": str(out), **facts}
        write_json(self.root / _OUTPUTS, {"outputs": [*others, entry]}, durable=False)

    def outputs(self) -> list[dict[str, Any]]:
        """Return the finished outputs in the order in which they were written.

        Runs of earlier versions did not record them; a damaged record is taken for none.
        """
        try:
            found = parse_json(read_bytes(self.root / _OUTPUTS))
        except (OSError, ValueError):
            return []
        entries = found.get("outputs") if isinstance(found, dict) else None
        return list(filter(_is_output, entries if isinstance(entries, list) else []))

    def remove(self, *, dry_run: bool = False) -> Cleaning:
        """Remove the files of the run, and the directory once it is empty.

        Args:
            dry_run: Only list; no file is removed.

        Raises:
            InputError: The directory has no run, or is a link.
            UsageError: A driver is using it.
            OrchestratorError: A file cannot be removed.
        """
        status = self.status()
        if status["state"] == "running":
            holder = f"process {status.get('pid')} on {status.get('host')}"
            raise UsageError(f"{self.root}: in use by {holder}; stop it first")
        if isinstance(self.root, Path) and self.root.is_symlink():
            raise InputError(f"{self.root}: is a link; name its target, {self.root.resolve()}")
        return sort_content(self.root) if dry_run else remove_content(self.root, last=self.marker)

    def remove_remains(self) -> None:
        """Remove files that workers have written since the directory was removed."""
        for wait in REMAINS_SECONDS:
            time.sleep(wait)
            with suppress(OSError, OrchestratorError):
                if self.is_removed():
                    remove_content(self.root, last=self.marker)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**53  # type: ignore[arg-type]


def _is_progress(found: object, stage: object) -> bool:
    """True if a status has no progress, or a count with its unit, of a stage."""
    if found is None:
        return True
    if not isinstance(found, dict) or not isinstance(stage, str):
        return False
    fraction = found.get("fraction")
    numbers = [found.get("done"), found.get("total"), 0 if fraction is None else fraction]
    return isinstance(found.get("of"), str) and all(map(_is_number, numbers))


def _is_output(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("out"), str):
        return False
    return all(_is_number(entry.get(name, 0)) for name in ("kept", "parameters"))


def _read(path: Place, otherwise: str) -> dict[str, Any]:
    try:
        value = parse_json(read_bytes(path))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: {otherwise}: {path.name} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: contains {type(value).__name__}, not an object")
    return value
