"""Diagnostics of a failed worker process: its stacks if it hangs, and the end of its log.

Python's `faulthandler` writes the stacks from the signal handler itself, so that it works while
native code blocks all Python threads. The functions that take a process id run on its node.
"""

import faulthandler
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

TAIL_BYTES = 12_000
STACKS_SECONDS = 2.0
_POLL_SECONDS = 0.1
_SIGNAL = signal.SIGUSR1
_STDERR = 2


def listen() -> str:
    """Make this process write its threads' stacks to stderr on a signal. Returns stderr's path."""
    faulthandler.register(_SIGNAL, file=_STDERR, all_threads=True)
    return os.readlink(f"/proc/self/fd/{_STDERR}")


def tail(log: str) -> str:
    """End of a log, or the reason for which it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"{log}: cannot be read: {error.strerror}"


def end_hung(pid: int, log: str) -> str:
    """Kill a process that hangs. Returns the end of its log, with its stacks.

    A stopped process (SIGSTOP) writes no stacks; its state is added instead.
    """
    before = _size(log)
    with suppress(ProcessLookupError):
        os.kill(pid, _SIGNAL)
    until = time.monotonic() + STACKS_SECONDS
    while _size(log) == before and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    # the dump is written line by line
    time.sleep(_POLL_SECONDS)
    said = tail(log)
    if _size(log) == before:
        said += f"\nno stacks within {STACKS_SECONDS:.0f} s; the process was {_state(pid)}"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return said


def _size(log: str) -> int:
    try:
        return Path(log).stat().st_size
    except OSError:
        return 0


def _state(pid: int) -> str:
    """State of a process in the kernel: `T (stopped)`, `D (disk sleep)`."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "gone"
    return next(line.split("\t")[1] for line in lines if line.startswith("State:"))
