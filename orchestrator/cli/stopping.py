"""Signals before the start of a run and after its end."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from orchestrator.errors import StoppedError


@contextmanager
def stoppable(when: str = " before the run began") -> Iterator[None]:
    """Exit with 75 on SIGTERM and SIGINT also before the run has started.

    During these seconds packages are imported and the model is located. No cleanup is needed yet,
    and imports would convert an exception into another one, so the process exits immediately. After
    a run was stopped, signals are ignored until the exit.

    Args:
        when: End of the message; empty where the command may be one without a run.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, partial(_leave, when)) for number in numbers}
    try:
        yield
    except StoppedError:
        previous = dict.fromkeys(numbers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(when: str, number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"orchestrator: error: stopped by {name}{when}\n"
    os.write(sys.stderr.fileno(), line.encode())
    os._exit(StoppedError.exit_code)
