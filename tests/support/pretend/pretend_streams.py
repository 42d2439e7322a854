"""Streams of a simulated CUDA device, with a check of their synchronisation; see `pretend`.

Every operation runs at once, in the program's order. The check is that no stream and no host relies
on this order, since the streams of a device run at any pace:

- An operation that reads memory written in another stream, or writes memory used in another stream,
  comes after an event of that stream, `wait_stream`, or a synchronisation by the host.
- Freed memory returns to the stream of its allocation. The next allocation in that stream comes
  after all uses in other streams, unless `record_stream` names them.
- A non-blocking copy ends when the host synchronises. Before that a pinned target holds NaN, or the
  least integer, and a pinned source must keep its values.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pretend_site import Site, site
from torch import Tensor

Past = dict[int, int]
"""Number of finished operations by stream number."""


class StreamCall(NamedTuple):
    """A call of a stream or an event."""

    operation: str
    stream: int
    site: Site


class Use(NamedTuple):
    """An operation of a stream, by its number in that stream, that uses some memory."""

    stream: int
    operation: int


class Freed(NamedTuple):
    """Memory returned to a stream, with its uses in other streams."""

    size: int
    uses: list[Use]


class Order:
    """The streams of a device, and the last uses of its memory."""

    def __init__(self) -> None:
        self.calls: list[StreamCall] = []
        self.streams = [Stream(self, 0)]
        self.host: Past = {}
        """The operations that the host has waited for."""
        self._current = threading.local()
        self._before_streams = 0
        self._owners: dict[int, int] = {}
        self._writes: dict[int, Use] = {}
        self._reads: dict[int, dict[int, int]] = {}
        self._recorded: dict[int, set[int]] = {}
        self._freed: dict[int, list[Freed]] = {}
        self._lock = threading.RLock()
        self._copies: list[tuple[Use, Callable[[], None]]] = []

    @property
    def stream(self) -> "Stream":
        """The current stream of this thread."""
        found: Stream = getattr(self._current, "stream", self.streams[0])
        return found

    @stream.setter
    def stream(self, stream: "Stream") -> None:
        self._current.stream = stream

    @contextmanager
    def within(self, stream: "Stream | None") -> Iterator[None]:
        """Set the current stream, as `torch.cuda.stream`."""
        before = self.stream
        self.stream = stream or before
        try:
            yield
        finally:
            self.stream = before

    def new_stream(self, *_: Any, **__: Any) -> "Stream":
        """A side stream, which has waited for no other."""
        if len(self.streams) == 1:
            self._before_streams = self.streams[0].past[0]
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    def operate(self, read: Iterable[int], written: Iterable[int]) -> None:
        """Add an operation of the current stream on memory at these addresses.

        Raises:
            RuntimeError: It does not wait for an operation of another stream on this memory.
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
        """The last write to memory; for memory without one, the time of the first side stream."""
        return self._writes.get(pointer, Use(0, self._before_streams))

    def allocate(self, pointer: int, size: int) -> None:
        """Give memory to the current stream.

        Raises:
            RuntimeError: It may be freed memory that another stream still uses.
        """
        stream = self.stream
        self._owners[pointer] = stream.number
        if len(self.streams) == 1:
            return
        self._writes[pointer] = Use(stream.number, stream.past[stream.number])
        freed = self._freed.pop(stream.number, [])
        self._freed[stream.number] = [each for each in freed if each.size < size]
        for each in freed:
            if each.size >= size:
                stream.require(each.uses, "is given memory that stream {} uses; record_stream?")

    def free(self, pointer: int, size: int) -> None:
        """Return memory to the stream of its allocation."""
        owner = self._owners.pop(pointer, 0)
        uses = [Use(*each) for each in self._reads.pop(pointer, {}).items()]
        if pointer in self._writes:
            uses.append(self._writes.pop(pointer))
        done = {owner, *self._recorded.pop(pointer, ())}
        uses = [use for use in uses if use.stream not in done]
        if uses:
            self._freed.setdefault(owner, []).append(Freed(size, uses))

    def record(self, pointer: int, stream: "Stream") -> None:
        """Keep freed memory with a stream until that has finished its use."""
        self._recorded.setdefault(pointer, set()).add(stream.number)

    def later(self, finish: Callable[[], None]) -> None:
        """Call `finish` once the host has waited for the current stream's last operation."""
        stream = self.stream
        with self._lock:
            self._copies.append((Use(stream.number, stream.past[stream.number]), finish))

    def wait(self, past: Past) -> None:
        """Let the host wait, and end the copies that are finished then."""
        with self._lock:
            _merge(self.host, past)
            waiting, self._copies = self._copies, []
            for use, finish in waiting:
                if self.host.get(use.stream, 0) >= use.operation:
                    finish()
                else:
                    self._copies.append((use, finish))

    def synchronize(self, *_: Any) -> None:
        """`torch.cuda.synchronize`."""
        self.stream.note("synchronize")
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Let the host wait for every stream."""
        for stream in self.streams:
            self.wait(stream.past)


class Stream:
    """A stream; `past` counts the operations that end before its next one."""

    def __init__(self, order: Order, number: int) -> None:
        self.number = self.cuda_stream = number
        self.device = torch.device("cuda:0")
        self.past: Past = {number: 0}
        self._order = order

    def require(self, uses: Iterable[Use], wrong: str) -> None:
        """Raise RuntimeError unless the stream or the host has waited for these uses."""
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
        """True: every operation is over, and the host knows it from here on."""
        self._order.wait(self.past)
        return True


class Event:
    """A point in a stream."""

    def __init__(self, *_: Any, order: Order, **__: Any) -> None:
        self.past: Past = {}
        self._order = order
        self._stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or self._order.stream
        self._stream.note("record_event")
        self.past = dict(self._stream.past)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._order.stream).wait_event(self)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.note("synchronize_event")
            self._order.wait(self.past)

    def query(self) -> bool:
        """True: the event is over, and the host knows it from here on."""
        self._order.wait(self.past)
        return True


def _merge(past: Past, other: Past) -> None:
    """Add the operations of another past."""
    for stream, operation in other.items():
        past[stream] = max(past.get(stream, 0), operation)


def arrive_later(order: Order, target: Tensor) -> None:
    """Hide the values of a copy's target on the host until the host has waited."""
    values = target.clone()
    if target.dtype.is_floating_point:
        target.fill_(torch.nan)
    else:
        target.fill_(False if target.dtype == torch.bool else torch.iinfo(target.dtype).min)
    order.later(lambda: target.copy_(values))


def leave_until_then(order: Order, source: Tensor, where: Site) -> None:
    """Checks, when the host has waited, that a copy's source on the host has kept its values."""
    values = _bytes(source).clone()

    def check() -> None:
        if not torch.equal(_bytes(source), values):
            raise RuntimeError(f"the source of a copy was written to before its end ({where})")

    order.later(check)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
