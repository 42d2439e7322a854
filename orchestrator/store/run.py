"""One run directory: recipe, status, journal, units and boundary chunks.

run.json       what was asked, of which model, with which versions
status.json    where it stands; replaced as a whole, readable when everything else is gone
events.jsonl   what happened, one line an event, appended
units/         work that is done (see `units`)
chunks/        boundary chunks of the pass at hand (see `chunks`)
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import digest_json, write_json
from orchestrator.store.units import Units

_FORMAT_VERSION = 1
_MARKER = "run.json"
_STATUS = "status.json"
_EVENTS = "events.jsonl"


class RunDirectory:
    """A run directory on a path that the driver and every worker see."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.units = Units(root / "units")

    def chunks(self, pass_key: str, environment: Mapping[str, Any]) -> Chunks:
        """The boundary chunks of one pass in one environment; no others are mistaken for them."""
        return Chunks(self.root / "chunks" / digest_json([pass_key, dict(environment)])[:16])

    def claim(self, description: Mapping[str, Any]) -> None:
        """Makes the directory this run's, or takes it up again.

        Raises:
            InputError: It exists, is not empty and is no run directory.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root}: is a file; a run directory was expected")
        if self.root.is_dir() and any(self.root.iterdir()) and not (self.root / _MARKER).exists():
            raise InputError(
                f"{self.root}: holds files but no {_MARKER}, so it is no run directory; "
                "name another with --run-dir"
            )
        write_json(self.root / _MARKER, {"format_version": _FORMAT_VERSION, **description})

    def description(self) -> dict[str, Any]:
        """What `claim` wrote.

        Raises:
            InputError: There is no run here, or one of an unknown format.
        """
        return _read(self.root / _MARKER, "is no run directory")

    def write_status(self, **fields: Any) -> None:
        """Replaces the status; `pid`, `host` and `updated` (seconds since 1970) are added."""
        where = {"pid": os.getpid(), "host": socket.gethostname(), "updated": time.time()}
        write_json(self.root / _STATUS, {**where, **fields}, durable=False)

    def status(self) -> dict[str, Any]:
        """The last status written; a running one whose process is gone says `lost`.

        Raises:
            InputError: There is no run here.
        """
        self.description()
        if not (self.root / _STATUS).exists():
            return {"state": "new"}
        status = _read(self.root / _STATUS, "has no readable status")
        here = status.get("host") == socket.gethostname()
        if status.get("state") == "running" and here and not _alive(status.get("pid")):
            status["state"] = "lost"
        return status

    def append(self, event: Mapping[str, Any]) -> None:
        """Adds one event to the journal in a single write."""
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False) + "\n"
        with (self.root / _EVENTS).open("a", encoding="utf-8") as file:
            file.write(line)

    def remove(self) -> None:
        """Removes the run directory, and nothing that is not one.

        Raises:
            InputError: There is no run here.
        """
        self.description()
        shutil.rmtree(self.root)


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: {otherwise}: there is no {path.name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, an object was expected")
    return value


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
