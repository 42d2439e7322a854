"""Lease of a run directory or an output: a small file that the driver renews.

It only prevents users from starting the same run twice; stores have no locks that survive a driver.
If two drivers run nevertheless, the result is still correct: units are named by their inputs and
written atomically, so both write the same content.

A lease is stale if its process on this host has ended, or if it is not renewed while another driver
watches it for half a minute; clocks of different hosts are not compared.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.store.files import parse_json, read_bytes, write_json
from orchestrator.store.places import Place, Remote

LEASE_FILE = "hold.json"
RENEW_SECONDS = 5.0
STALE_SECONDS = 30.0
"""Time for which a holder on another host is watched for a renewal."""
SETTLE_SECONDS = 1.0
"""Time after which a store shows both of two concurrent writers the same holder."""
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
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="hold", daemon=True)
        self.note: str | None = None
        """State found on acquisition, for the journal."""
        self.taken_by: str | None = None
        """The driver that has taken over since, after no renewal was seen."""

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
                self._remove(found)
            if self._acquire():
                break
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
            time.sleep(_LOOK_SECONDS if not isinstance(self.place, Remote) else SETTLE_SECONDS)
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

    def _remove(self, found: dict[str, Any]) -> None:
        """Remove the file of a holder that has ended; another driver may be faster."""
        if _read(self.place) == found:
            self.place.unlink(missing_ok=True)

    def _acquire(self) -> bool:
        """Write the file; returns True if ours is the first on disk, or the last in a store.

        Raises:
            OrchestratorError: The file cannot be written.
        """
        if isinstance(self.place, Remote):
            write_json(self.place, self._content())
            time.sleep(SETTLE_SECONDS)
            return (_read(self.place) or {}).get("id") == self._id
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
