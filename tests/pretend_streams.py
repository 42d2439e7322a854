"""Streams of a pretended CUDA device: what an operation may use before another is over.

Everything is done at once, in the program's order. Whether the order is one that streams keep is
checked beside it, as on a device whose streams may run at any pace:

- An operation uses memory that another stream writes, or writes what another stream reads, only
  behind an event of that stream or a synchronisation of the host.
- Memory goes back to the stream that it was allocated in when its tensors are gone, and that
  stream writes to it again: other streams that use it are behind `record_stream` or an event.
- A non-blocking copy is over when the host has waited for it. Until then the host finds no values
  in its target (NaN, or the least integer), and leaves its source as it is.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pretend_site import Site, site
from torch import Tensor

Past = dict[int, int]
"""By the number of a stream, how many of its operations are over."""


class StreamCall(NamedTuple):
    """A call of a stream or an event."""

    operation: str
    stream: int
    site: Site


class Use(NamedTuple):
    """The last use of memory in a stream."""

    stream: int
    operation: int


class Freed(NamedTuple):
    """Memory that went back to a stream while others were not known to be done with it."""

    size: int
    uses: list[Use]


class Order:
    """All streams of a device, and who used which memory last."""

    def __init__(self) -> None:
        self.calls: list[StreamCall] = []
        self.streams = [Stream(self, 0)]
        self.host: Past = {}
        """What the host has waited for."""
        self._current = threading.local()
        self._before_streams = 0
        self._owners: dict[int, int] = {}
        self._writes: dict[int, Use] = {}
        self._reads: dict[int, dict[int, int]] = {}
        self._recorded: dict[int, set[int]] = {}
        self._freed: dict[int, list[Freed]] = {}
        self._copies: list[tuple[Use, Callable[[], None]]] = []

    @property
    def stream(self) -> "Stream":
        """The current stream, which each thread has for itself."""
        found: Stream = getattr(self._current, "stream", self.streams[0])
        return found

    @stream.setter
    def stream(self, stream: "Stream") -> None:
        self._current.stream = stream

    @contextmanager
    def within(self, stream: "Stream | None") -> Iterator[None]:
        """Makes a stream the current one, as `torch.cuda.stream` does."""
        before = self.stream
        self.stream = stream or before
        try:
            yield
        finally:
            self.stream = before

    def new_stream(self, *_: Any, **__: Any) -> "Stream":
        """A side stream, which knows nothing of what others have done."""
        self._before_streams = self.streams[0].past[0]
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    def operate(self, read: Iterable[int], written: Iterable[int]) -> None:
        """An operation of the current stream on memory at these addresses.

        Raises:
            RuntimeError: Another stream may not be done with some of it.
        """
        stream = self.stream
        stream.past[stream.number] += 1
        if len(self.streams) == 1:
            return
        tick = stream.past[stream.number]
        for pointer in read:
            stream.require([self._last_write(pointer)], "reads what stream {} writes")
            self._reads.setdefault(pointer, {})[stream.number] = tick
        for pointer in written:
            stream.require([self._last_write(pointer)], "writes what stream {} writes")
            reads = [Use(*each) for each in self._reads.pop(pointer, {}).items()]
            stream.require(reads, "writes what stream {} reads")
            self._writes[pointer] = Use(stream.number, tick)

    def _last_write(self, pointer: int) -> "Use":
        """Memory of which nothing is known is from before there were side streams."""
        return self._writes.get(pointer, Use(0, self._before_streams))

    def allocate(self, pointer: int, size: int) -> None:
        """Memory is given to the current stream.

        Raises:
            RuntimeError: It may be some that another stream still uses.
        """
        stream = self.stream
        self._owners[pointer] = stream.number
        if len(self.streams) == 1:
            return
        self._writes[pointer] = Use(stream.number, stream.past[stream.number])
        for freed in self._freed.pop(stream.number, []):
            if size <= freed.size:
                stream.require(freed.uses, "is given memory that stream {} uses; record_stream?")

    def free(self, pointer: int, size: int) -> None:
        """No tensor is left of memory, which goes back to the stream that it came from."""
        owner = self._owners.pop(pointer, 0)
        uses = [Use(*each) for each in self._reads.pop(pointer, {}).items()]
        if pointer in self._writes:
            uses.append(self._writes.pop(pointer))
        done = {owner, *self._recorded.pop(pointer, ())}
        uses = [use for use in uses if use.stream not in done]
        if uses:
            self._freed.setdefault(owner, []).append(Freed(size, uses))

    def record(self, pointer: int, stream: "Stream") -> None:
        """Memory is not given away before what a stream was asked until then is over."""
        self._recorded.setdefault(pointer, set()).add(stream.number)

    def later(self, finish: Callable[[], None]) -> None:
        """Has the end of a copy, the current stream's last operation, wait for the host."""
        stream = self.stream
        self._copies.append((Use(stream.number, stream.past[stream.number]), finish))

    def wait(self, past: Past) -> None:
        """The host waits; copies end that are then over."""
        _merge(self.host, past)
        waiting, self._copies = self._copies, []
        for use, finish in waiting:
            if self.host.get(use.stream, 0) >= use.operation:
                finish()
            else:
                self._copies.append((use, finish))

    def wait_for_all(self) -> None:
        for stream in self.streams:
            self.wait(stream.past)


class Stream:
    """A stream; `past` is what is over before its next operation."""

    def __init__(self, order: Order, number: int) -> None:
        self.number = self.cuda_stream = number
        self.device = torch.device("cuda:0")
        self.past: Past = {number: 0}
        self._order = order

    def require(self, uses: Iterable[Use], wrong: str) -> None:
        """Raises RuntimeError unless uses of other streams are over."""
        for use in uses:
            known = max(self.past.get(use.stream, 0), self._order.host.get(use.stream, 0))
            if use.stream != self.number and known < use.operation:
                raise RuntimeError(
                    f"stream {self.number} {wrong.format(use.stream)}: it has not waited for that "
                    f"stream ({site()})"
                )

    def note(self, operation: str) -> None:
        self._order.calls.append(StreamCall(operation, self.number, site()))

    def wait_stream(self, stream: "Stream") -> None:
        self.note(f"wait_stream {stream.number}")
        _merge(self.past, stream.past)

    def wait_event(self, event: "Event") -> None:
        self.note("wait_event")
        _merge(self.past, event.past)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(order=self._order)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.note("synchronize")
        self._order.wait(self.past)

    def query(self) -> bool:
        """Whether it is done; it always is, and the host knows it then."""
        self._order.wait(self.past)
        return True


class Event:
    """A point in a stream."""

    def __init__(self, *_: Any, order: Order, **__: Any) -> None:
        self.past: Past = {}
        self._order = order
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._order.stream
        stream.note("record_event")
        self.past = dict(stream.past)
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._order.stream).wait_event(self)

    def synchronize(self) -> None:
        self._order.stream.note("synchronize_event")
        self._order.wait(self.past)

    def query(self) -> bool:
        """Whether it is over; it always is, and the host knows it then."""
        self._order.wait(self.past)
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of the host between the two."""
        return 1e3 * (end._seconds - self._seconds)


def _merge(past: Past, other: Past) -> None:
    """Adds what is over in another past."""
    for stream, operation in other.items():
        past[stream] = max(past.get(stream, 0), operation)


def arrive_later(order: Order, target: Tensor) -> None:
    """Hides the values of a copy's target on the host until the host has waited for it."""
    values = target.clone()
    if target.dtype.is_floating_point:
        target.fill_(torch.nan)
    else:
        target.fill_(False if target.dtype == torch.bool else torch.iinfo(target.dtype).min)
    order.later(lambda: target.copy_(values))


def leave_until_then(order: Order, source: Tensor, where: Site) -> None:
    """Has the end of a copy check that its source on the host is what it was."""
    values = _bytes(source).clone()

    def check() -> None:
        if not torch.equal(_bytes(source), values):
            raise RuntimeError(f"the source of a copy was written to before its end ({where})")

    order.later(check)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
