"""Local copies of files of an object store, for one process.

Copies are under TMPDIR, which should be on a local disk of the node. The directory of a process
holds a file lock, which ends with the process; directories left by killed processes are removed by
the next process.
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
"""Size limit of the copies; above it, the least recently used ones are removed."""
_SUFFIX = ".cache"
_LOCK = "lock"


class Cache:
    """Least-recently-used cache of local copies of remote files.

    Args:
        root: Parent of the directories of all processes.
        limit: Maximum size in bytes; one copy is always kept.
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
        # locked before other processes look at it
        new.rename(self._directory)
        remove_abandoned(root)

    def temporary(self, suffix: str = "") -> Path:
        """Return an unused file name of this process."""
        return self._directory / f"{uuid.uuid4().hex}{suffix}"

    def fetch(self, place: Remote, check: Callable[[Remote, Path], None]) -> Path:
        """Return a copy of the object; it is kept until space is needed.

        Args:
            check: Raises if a new copy has the wrong content.

        Raises:
            FileNotFoundError: The object does not exist.
            OrchestratorError: As `Remote.download`, and as `check`.
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
        """Size of all copies in bytes."""
        return sum(size for _, size in self._copies.values())

    def forget(self, directory: Remote) -> None:
        """Remove the copies of the objects directly under a name."""
        with self._guard:
            for place in [each for each in self._copies if each.parent == directory]:
                self._give_up(place)

    def close(self) -> None:
        """Remove all copies."""
        with self._guard:
            self._copies = {}
            shutil.rmtree(self._directory, ignore_errors=True)
            self._lock.close()

    def _give_up(self, place: Remote) -> None:
        # processes with open or mapped files keep their content
        self._copies.pop(place)[0].unlink(missing_ok=True)


@cache
def process_cache() -> Cache:
    """Return the cache of this process, removed at exit."""
    root = Path(tempfile.gettempdir()) / f"orchestrator-{os.getuid()}"
    found = Cache(root)
    atexit.register(remove_abandoned, root)
    atexit.register(found.close)
    return found


@contextmanager
def temporary_file(suffix: str = "") -> Iterator[Path]:
    """Yield an unused local file name; the file is removed at the end."""
    path = process_cache().temporary(suffix)
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_abandoned(root: Path) -> None:
    """Remove the directories of processes that have ended."""
    for lock in root.glob(f"*{_SUFFIX}/{_LOCK}"):
        with suppress(OSError), lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
