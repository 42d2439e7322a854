"""What processes take: memory that they hold for themselves, and CPU seconds."""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

INTERVAL_SECONDS = 0.02
FIELDS = ("RssAnon", "RssShmem")


def resident_bytes(status: str) -> int:
    """Anonymous and shared memory of a process, from the text of its /proc/PID/status.

    Pages of mapped files are left out: the kernel takes them back when it needs them.
    """
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words[0].rstrip(":") in FIELDS)


class PeakWatcher:
    """Follows processes from the moment each is named; keeps what they held then and at most."""

    def __init__(self) -> None:
        self._baselines: dict[int, int] = {}
        self._peaks: dict[int, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakWatcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def follow(self, pid: int) -> None:
        """What the process holds now is its baseline."""
        self._baselines[pid] = self._peaks[pid] = _read(pid)

    def above_baseline(self, pid: int) -> int:
        return self._peaks[pid] - self._baselines[pid]

    def sample(self) -> None:
        """Looks once; the thread does so all the time."""
        for pid in list(self._peaks):
            self._peaks[pid] = max(self._peaks[pid], _read(pid))

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.sample()
            time.sleep(INTERVAL_SECONDS)


def _read(pid: int) -> int:
    try:
        return resident_bytes(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0  # it has ended


def cpu_seconds(pids: Iterable[int]) -> float:
    """Of all threads of these processes since they began; nothing of those that have ended."""
    return sum(_ticks(_stat(pid)) for pid in pids) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {
        int(path.name): int(words[1])
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and (words := _stat(int(path.name)))
    }
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def _stat(pid: int) -> list[str]:
    """The words of /proc/PID/stat behind the name, which may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _ticks(words: list[str]) -> int:
    return int(words[11]) + int(words[12]) if words else 0
