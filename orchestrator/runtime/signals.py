"""SIGTERM and SIGINT during a run: recorded at once, obeyed as soon as the program can.

Python runs a signal's handler when the main thread executes bytecode again; the start of Ray or the
decomposition of a large matrix delays that for seconds, and Ray kills a job three seconds after its
SIGTERM. The interpreter therefore also writes the signal's number to a socket, from which a thread
reads and records it while the main thread is busy.
"""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Convert the first SIGTERM or SIGINT to a call of `note` and a KeyboardInterrupt.

    It is a KeyboardInterrupt because libraries catch `Exception` in places. Later signals are
    ignored, so that the clean-up is not interrupted; the first one cannot be lost. Outside the main
    thread, where Python allows no handlers, signals are not handled.

    Args:
        note: Called in another thread, once, with the signal's name.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._raised = False
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}
        self.received: str | None = None
        """Name of the first signal; None before it."""

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._previous_sender = signal.set_wakeup_fd(
            self._sender.fileno(), warn_on_full_buffer=False
        )
        self._previous = {number: signal.signal(number, self._interrupt) for number in STOPPING}
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._previous:
            return
        self._raised = True
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_sender, warn_on_full_buffer=False)
        self._sender.close()
        # numbers that are in the socket are still read
        self._thread.join()
        self._receiver.close()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Delay the interrupt to the end of the body; the signal is recorded at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            # a handler of Ray may have set an alarm that aborts the process
            signal.alarm(0)
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt after a signal, in case the handler's one was swallowed."""
        if self.received is not None:
            self._raised = True
            raise KeyboardInterrupt(self.received)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not (self._raised or self._deferred):
            self._raised = True
            raise KeyboardInterrupt(signal.Signals(number).name)

    def _listen(self) -> None:
        while numbers := self._receiver.recv(64):
            for number in numbers:
                if number in STOPPING and self.received is None:
                    self.received = signal.Signals(number).name
                    # the main thread writes the status as well, and reports errors
                    with suppress(Exception):
                        self._note(self.received)
