"""SIGTERM and SIGINT during a run: noted at once, and obeyed as soon as the program can.

Python runs a signal's handler when the main thread is back in bytecode, and starting Ray or
decomposing a large matrix keeps it from there for seconds; Ray kills a job three seconds after its
SIGTERM. So the interpreter also passes the signal's number through a socket to a thread of ours,
which notes it while the main thread is still away.
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
    """Turns the first SIGTERM or SIGINT into `note`, and a KeyboardInterrupt where the program is.

    It is a KeyboardInterrupt because libraries catch every `Exception` here and there. Later
    signals are ignored, so that cleaning up is not interrupted; the first one cannot be lost.
    Outside the main thread, where Python allows no handlers, nothing is done.

    Args:
        note: Called in another thread, once, with the signal's name.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._raised = False
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}
        self.received: str | None = None
        """Name of the signal that came first."""

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
        # what was sent is still read
        self._thread.join()
        self._receiver.close()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the body come to its end before a signal interrupts; it is noted all the same."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            # a handler of Ray's own may have set an alarm that aborts the process
            signal.alarm(0)
        self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came: what the handler raised can be swallowed."""
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
                    # the main thread writes the status too, and reports what fails
                    with suppress(Exception):
                        self._note(self.received)
