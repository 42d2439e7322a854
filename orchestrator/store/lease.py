"""Lease of a run directory or an output: a small file that the driver renews.

Of several drivers that take it at once, one gets it. On a disk that has locks they take it in turn,
under a lock of the directory. In a store each driver first writes an object of its own name, then
lists these objects: of two drivers at least one sees the other, gives way and retries. This needs
only that a store lists what has been written, as S3, GCS and Azure guarantee. A driver that is
suspended for half a minute can lose the lease and not notice for `RENEW_SECONDS`; the result is
still correct, because units are named by their inputs and written atomically, so both write the
same content.

A lease is stale if its process on this host has ended, or if it is not renewed while another driver
watches it for half a minute; clocks of different hosts are not compared.
"""

import fcntl
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.store.files import is_missing, parse_json, read_bytes, write_json
from orchestrator.store.places import Place, Remote

LEASE_FILE = "hold.json"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
"""Time for which a holder on another host is watched for a renewal."""
_APART_SECONDS = 0.1, 0.5
"""Range of the random time after which drivers that gave way to each other retry."""
FORSAKEN_SECONDS = 120.0
"""By the clocks of two hosts, which may differ by a minute."""
_LOOK_SECONDS = 0.25

_ours: set[str] = set()
"""Leases of this process."""

Tell = Callable[[dict[str, Any]], None]


class Lease:
    """Lease that can be acquired once; a thread renews it, and writes it again if it was removed.

    Args:
        place: The file of the lease.
        beat: Called by the thread at each renewal; its exceptions are ignored.
    """

    def __init__(self, place: Place, *, beat: Callable[[], None] = lambda: None) -> None:
        self.place = place
        self._beat = beat
        self._id = uuid.uuid4().hex
        self._since = time.time()
        self._renewals = 0
        self._seen: dict[str, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="hold", daemon=True)
        self.note: str | None = None
        """State found on acquisition, for the journal."""
        self.taken_by: str | None = None
        """The driver that has taken over since, after no renewal was seen."""
        self._markers: tuple[Place, ...] = ()
        self.is_removed = False
        """True if the markers were removed, and with them the directory that the lease is about."""

    def depend_on(self, *markers: Place) -> None:
        """End with the last of these files, of which one exists: the lease of a removed directory
        is not renewed, which would create the directory again."""
        self._markers = markers

    @contextmanager
    def taken(self, tell: Tell | None = None) -> Iterator["Lease"]:
        """Hold the lease while the body runs; takes it over from a driver that has ended.

        Args:
            tell: Called on a wait for another holder.

        Raises:
            UsageError: Another driver holds the lease.
            OrchestratorError: The file cannot be written.
        """
        self._take(tell)
        try:
            yield self
        finally:
            self._release()

    def _take(self, tell: Tell | None) -> None:
        while True:
            found = _read(self.place)
            if found is not None:
                self._check_ended(found, tell)
            with self._alone() as alone:
                if alone and _read(self.place) == found:
                    if not isinstance(self.place, Remote):
                        self.place.unlink(missing_ok=True)
                    if self._acquire():
                        break
            time.sleep(random.uniform(*_APART_SECONDS))
        _ours.add(self._id)
        self._thread.start()

    def _release(self) -> None:
        """Release the lease, unless another driver has taken it over."""
        self._done.set()
        self._thread.join(timeout=RENEW_SECONDS)
        _ours.discard(self._id)
        with suppress(OSError, OrchestratorError):
            if (_read(self.place) or {}).get("id") == self._id:
                self.place.unlink(missing_ok=True)

    def _check_ended(self, found: dict[str, Any], tell: Tell | None) -> None:
        """Raise UsageError unless the holder has ended; watches the lease if that is unclear.

        Process ids are reused, so an existing id does not prove that the holder is running.
        """
        here = found.get("host") == socket.gethostname()
        pid = found.get("pid")
        if found.get("id") in _ours:
            raise self._held(found)
        if here and (pid == os.getpid() or not is_alive(pid)):
            self.note = f"{_name(found)} held {self.place.parent} and has ended; taken over"
            return
        if here and _age(found) < 2 * RENEW_SECONDS:
            raise self._held(found)
        if tell is not None:
            waits = f"a sign of life of {_name(found)}, which holds {self.place.parent}"
            tell({"event": "waiting", "for": waits, "there": f"{STALE_SECONDS:.0f} s at most"})
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(4 * _LOOK_SECONDS if isinstance(self.place, Remote) else _LOOK_SECONDS)
            now = _read(self.place)
            if now is None:
                return
            if now != found:
                raise self._held(now)
        self.note = f"{_name(found)} held {self.place.parent} without renewing it; taken over"

    def _held(self, found: dict[str, Any]) -> UsageError:
        since = found.get("since")
        is_time = isinstance(since, int | float) and 0 <= since < 2**32
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if is_time else "long ago"
        return UsageError(
            f"{self.place.parent}: in use by {_name(found)} since {when}; "
            "wait for it to end, or stop it first"
        )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Yield True if no other driver takes the lease while the body runs."""
        if not isinstance(self.place, Remote):
            with suppress(OSError):
                self.place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.place.parent):
                yield True
            return
        mine = self.place.with_name(f"{self.place.name}-{self._id}")
        write_json(mine, self._content())
        try:
            yield self._others(mine) == []
        finally:
            mine.unlink(missing_ok=True)

    def _others(self, mine: Remote) -> list[str]:
        """Names of other drivers that take the lease; those of killed drivers are removed."""
        prefix = f"{self.place.name}-"
        names = [each for each in mine.parent.sizes() if each.startswith(prefix)]
        others = sorted(set(names) - {mine.name})
        now = time.monotonic()
        self._seen = {name: self._seen.get(name, now) for name in others}
        for name, first in self._seen.items():
            if now - first > STALE_SECONDS:
                (mine.parent / name).unlink(missing_ok=True)
        return others

    def _acquire(self) -> bool:
        """Write the file; returns True if it is ours. In a store the driver is alone (`_alone`).

        Raises:
            OrchestratorError: The file cannot be written.
        """
        if isinstance(self.place, Remote):
            write_json(self.place, self._content())
            return True
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with self.place.open("x", encoding="utf-8") as file:
                file.write(json.dumps(self._content(), sort_keys=True))
        except FileExistsError:
            return False
        except OSError as error:
            raise OrchestratorError(
                f"{self.place}: cannot be written: {error.strerror or error}; "
                "free or choose another place, then run the same command again"
            ) from error
        return True

    def _content(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "renewed": time.time(),
            "renewals": self._renewals,
        }

    def _renew(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            # a store or disk may be unavailable for a while; retried at the next renewal
            with suppress(Exception):
                if self._markers and all(map(is_missing, self._markers)):
                    self.is_removed = True
                    return
                found = _read(self.place)
                if found is None:
                    self._acquire()
                elif found.get("id") == self._id:
                    self._renewals += 1
                    write_json(self.place, self._content(), durable=False)
                elif "id" in found:
                    self.taken_by = _name(found)
                    return
            with suppress(Exception):
                self._beat()


def removed(directory: Place) -> OrchestratorError:
    """Return the error for an output that was removed under its driver."""
    return OrchestratorError(
        f"{directory}: was removed or renamed while this run was writing it; repeat the command, "
        "which continues from the run directory"
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Exclude other processes of this host, and of other hosts if the shared disk has locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            handle = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_forsaken(place: Place) -> bool:
    """Return True if the lease has no holder, or has not been renewed for long."""
    found = _read(place)
    return found is None or _age(found) > FORSAKEN_SECONDS


def is_alive(pid: object) -> bool:
    """Return True if a process of this host is running."""
    # 0 and below denote process groups
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(place: Place) -> dict[str, Any] | None:
    """Read the file; None if it does not exist, and without a holder if it is being written."""
    try:
        found = parse_json(read_bytes(place))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(found: dict[str, Any]) -> str:
    return f"process {found.get('pid')} on {found.get('host')}"


def _age(found: dict[str, Any]) -> float:
    """Seconds since the last renewal, by this host's clock; infinite if unknown."""
    renewed = found.get("renewed")
    return time.time() - renewed if isinstance(renewed, int | float) else float("inf")
