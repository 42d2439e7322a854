"""Copies of a store's files on this node's disk, for one process, while it needs them.

Under TMPDIR, so that is to be a disk of the node itself. A process that is killed cannot tidy up:
its directory holds a lock, which ends with it, and the next process that comes by removes it.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from orchestrator.store.places import Remote

CACHE_BYTES = 4 * 2**30
"""Copies beyond this are given up, those first that were not asked for longest."""
_SUFFIX = ".cache"
_LOCK = "lock"


class Cache:
    """Local copies of remote files, the latest ones.

    Args:
        root: Holds the directories of all processes.
        limit: Bytes that may lie here; one copy always does.
    """

    def __init__(self, root: Path, limit: int = CACHE_BYTES) -> None:
        self._directory = root / f"{uuid.uuid4().hex}{_SUFFIX}"
        self._limit = limit
        self._copies: dict[Remote, tuple[Path, int]] = {}
        self._guard = threading.RLock()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._directory.with_suffix(".new")
        new.mkdir()
        self._lock = (new / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # locked before others look at it
        new.rename(self._directory)
        remove_abandoned(root)

    def temporary(self, suffix: str = "") -> Path:
        """A name for a file of this process alone."""
        return self._directory / f"{uuid.uuid4().hex}{suffix}"

    def fetch(self, place: Remote, check: Callable[[Remote, Path], None]) -> Path:
        """A copy of the object; it lies there until others need the room.

        Args:
            check: Raises where a copy that has just come is not what it should be.

        Raises:
            FileNotFoundError: There is no such object.
            OrchestratorError: As `Remote.download`, and what `check` raises.
        """
        with self._guard:
            if place in self._copies:
                self._copies[place] = self._copies.pop(place)
                return self._copies[place][0]
            copy = self.temporary(f"-{place.name}")
            try:
                place.download(copy)
                check(place, copy)
            except BaseException:
                copy.unlink(missing_ok=True)
                raise
            self._copies[place] = copy, copy.stat().st_size
            while len(self._copies) > 1 and self.bytes > self._limit:
                self._give_up(next(iter(self._copies)))
            return copy

    @property
    def bytes(self) -> int:
        """Bytes of all copies."""
        return sum(size for _, size in self._copies.values())

    def forget(self, directory: Remote) -> None:
        """Gives up the copies of what lies right under a name."""
        with self._guard:
            for place in [each for each in self._copies if each.parent == directory]:
                self._give_up(place)

    def close(self) -> None:
        """Removes all copies."""
        with self._guard:
            self._copies = {}
            shutil.rmtree(self._directory, ignore_errors=True)
            self._lock.close()

    def _give_up(self, place: Remote) -> None:
        # who has it open or mapped keeps what it sees
        self._copies.pop(place)[0].unlink(missing_ok=True)


@cache
def process_cache() -> Cache:
    """The cache of this process; it goes with it."""
    root = Path(tempfile.gettempdir()) / f"orchestrator-{os.getuid()}"
    found = Cache(root)
    atexit.register(remove_abandoned, root)
    atexit.register(found.close)
    return found


@contextmanager
def temporary_file(suffix: str = "") -> Iterator[Path]:
    """A name on this node's disk; whatever lies there in the end is removed."""
    path = process_cache().temporary(suffix)
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_abandoned(root: Path) -> None:
    """Removes the directories of processes that are gone."""
    for lock in root.glob(f"*{_SUFFIX}/{_LOCK}"):
        with suppress(OSError), lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
