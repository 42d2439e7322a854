"""Who is at work on a run directory or an output: a small file that its driver renews.

It keeps people from starting the same run twice, and no more: stores have no locks that outlive a
driver. Should two drivers be at work after all, units are named by what they are made from and
written whole, so each can only write what the other would.

A hold is stale when its process is gone from this host, or when it is not renewed while another
driver looks on for half a minute; clocks of different hosts are not compared.
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
"""A holder elsewhere is waited for so long to show that it lives."""
SETTLE_SECONDS = 1.0
"""After this long a store that two have written to at once says to both whose hold it is."""
FORSAKEN_SECONDS = 120.0
"""By the clocks of two hosts, which may differ by a minute."""
_LOOK_SECONDS = 0.25

_ours: set[str] = set()
"""The holds of this process."""

Tell = Callable[[dict[str, Any]], None]


class Lease:
    """To be held once; a thread renews it, and makes it anew where it was removed.

    Args:
        place: The file.
        beat: Called by the thread each time; what it raises is passed over.
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
        """What was found when it was taken, for the journal."""
        self.taken_by: str | None = None
        """Who has taken it over since, having seen no sign of life."""

    @contextmanager
    def taken(self, tell: Tell | None = None) -> Iterator["Lease"]:
        """Holds it as long as the body runs; takes it over from a holder that is gone if need be.

        Args:
            tell: Told of a wait for another holder.

        Raises:
            UsageError: Another driver holds it.
            OrchestratorError: It cannot be written.
        """
        self._take(tell)
        try:
            yield self
        finally:
            self._give_back()

    def _take(self, tell: Tell | None) -> None:
        while True:
            found = _read(self.place)
            if found is not None:
                self._check_gone(found, tell)
                self._remove(found)
            if self._place_ours():
                break
        _ours.add(self._id)
        self._thread.start()

    def _give_back(self) -> None:
        """Unless another has taken it over."""
        self._done.set()
        self._thread.join(timeout=RENEW_SECONDS)
        _ours.discard(self._id)
        with suppress(OSError, OrchestratorError):
            if (_read(self.place) or {}).get("id") == self._id:
                self.place.unlink(missing_ok=True)

    def _check_gone(self, found: dict[str, Any], tell: Tell | None) -> None:
        """Raises UsageError unless the holder is gone; looks on for a while where that is unclear.

        A process may have the number of one that is gone, so a number alone proves no life.
        """
        here = found.get("host") == socket.gethostname()
        pid = found.get("pid")
        if found.get("id") in _ours:
            raise self._held(found)
        if here and (pid == os.getpid() or not is_alive(pid)):
            self.note = f"{_name(found)} held {self.place.parent} and is gone; taken over"
            return
        if here and _age(found) < 2 * RENEW_SECONDS:
            raise self._held(found)
        if tell is not None:
            waits = f"{_name(found)} to renew its hold on {self.place.parent}, or not"
            tell({"event": "waiting", "for": waits, "there": f"{STALE_SECONDS:.0f} s at most"})
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS if not isinstance(self.place, Remote) else SETTLE_SECONDS)
            now = _read(self.place)
            if now is None:
                return
            if now != found:
                raise self._held(now)
        self.note = f"{_name(found)} held {self.place.parent} and does not renew that; taken over"

    def _held(self, found: dict[str, Any]) -> UsageError:
        since = found.get("since")
        is_time = isinstance(since, int | float) and 0 <= since < 2**32
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if is_time else "long ago"
        return UsageError(
            f"{self.place.parent}: {_name(found)} is at work on it since {when}; "
            "wait for its end, or stop it first"
        )

    def _remove(self, found: dict[str, Any]) -> None:
        """Takes the file of a holder that is gone out of the way; another may be faster."""
        if _read(self.place) == found:
            self.place.unlink(missing_ok=True)

    def _place_ours(self) -> bool:
        """Whether the file is ours now: the first to make it on disk, the last to write in a store.

        Raises:
            OrchestratorError: It cannot be written.
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
            # a store or a disk may be away for a while; the next time it is tried again
            with suppress(Exception):
                found = _read(self.place)
                if found is None:
                    self._place_ours()
                elif found.get("id") == self._id:
                    self._renewals += 1
                    write_json(self.place, self._content(), durable=False)
                elif "id" in found:
                    self.taken_by = _name(found)
                    return
            with suppress(Exception):
                self._beat()


def is_forsaken(place: Place) -> bool:
    """Whether nobody holds it, or its holder has not been heard of for long."""
    found = _read(place)
    return found is None or _age(found) > FORSAKEN_SECONDS


def is_alive(pid: object) -> bool:
    """Whether a process of this host runs."""
    # 0 and below name groups of processes
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
    """What the file says; nothing if it is not there. One that is being written has no holder."""
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
    """Seconds since it was renewed, by this host's clock; long ago, if it does not say."""
    renewed = found.get("renewed")
    return time.time() - renewed if isinstance(renewed, int | float) else float("inf")
