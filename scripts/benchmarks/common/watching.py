"""Memory and CPU seconds of processes."""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

INTERVAL_SECONDS = 0.02
FIELDS = ("RssAnon", "RssShmem")


def resident_bytes(status: str) -> int:
    """Sum the anonymous and shared memory of a process, from the text of its /proc/PID/status.

    Pages of mapped files are excluded: the kernel reclaims them when needed.
    """
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words[0].rstrip(":") in FIELDS)


class PeakWatcher:
    """Watcher of processes from the moment each is added: baseline and peak memory."""

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
        """Add a process, with its present memory as the baseline."""
        self._baselines[pid] = self._peaks[pid] = _read(pid)

    def above_baseline(self, pid: int) -> int:
        return self._peaks[pid] - self._baselines[pid]

    def sample(self) -> None:
        """Take one sample; the thread does so continuously."""
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
        return 0  # the process has ended


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of all threads of these processes since their start; 0 for ended processes."""
    return sum(_ticks(_stat(pid)) for pid in pids) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> set[int]:
    """Return a process and all its descendants."""
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
    """Return the fields of /proc/PID/stat after the name, which may contain spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _ticks(words: list[str]) -> int:
    return int(words[11]) + int(words[12]) if words else 0
