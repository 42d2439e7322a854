"""A pretended CUDA device's account: its memory, its streams, and what happened on it.

See `pretend`, which makes one and puts it in the place of torch's.
"""

import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import orchestrator

PACKAGE, TESTS = str(Path(orchestrator.__file__).parent), str(Path(__file__).parent)
TO_DEVICE, TO_HOST = "to device", "to host"


class Site(NamedTuple):
    """A line of the program."""

    file: str
    """Of the package, `models/shard.py`, or else of the tests, `tests/test_devices.py`."""
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def site() -> Site:
    """The innermost line of the package on the stack; of the tests if there is none."""
    frame, test = sys._getframe(1), Site("elsewhere", 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE):
            return Site(path[len(PACKAGE) + 1 :], frame.f_lineno)
        if test.line == 0 and path.startswith(TESTS) and not _is_own(path):
            test = Site(os.path.join("tests", path[len(TESTS) + 1 :]), frame.f_lineno)
        frame = frame.f_back
    return test


def _is_own(path: str) -> bool:
    return os.path.basename(path).startswith("pretend")


class Read(NamedTuple):
    """A value of the device that the host waited for."""

    operation: str
    site: Site


class Copy(NamedTuple):
    """A transfer between host and device."""

    direction: str
    """`TO_DEVICE` or `TO_HOST`."""
    bytes: int
    """Bytes that cross the bus."""
    converted: int
    """Bytes that the host writes beside those, in another dtype or another order."""
    pinned: bool
    non_blocking: bool
    stream: int
    """Number of the current stream; 0 is the default one."""
    site: Site


class Conversion(NamedTuple):
    """A tensor of the host that is brought to another dtype or order there."""

    operation: str
    bytes: int
    site: Site


class Unordered(NamedTuple):
    """An operation that ran without a fixed order of its sums."""

    operation: str
    in_backward: bool
    site: Site


class StreamCall(NamedTuple):
    """A call of a stream or an event."""

    operation: str
    stream: int
    site: Site


@dataclass(slots=True)
class Memory:
    """Bytes of the tensors that live on the device; temporaries of an operation are not counted."""

    total: int
    allocated: int = 0
    peak: int = 0
    reserved: int = 0
    """Bytes that torch's allocator would hold: the most allocated since it was last emptied."""
    peak_reserved: int = 0
    _users: Counter[int] = field(default_factory=Counter)

    def hold(self, owner: object, storage: torch.UntypedStorage) -> None:
        """Counts a storage while the owner lives; once, however many owners share it."""
        pointer, size = storage.data_ptr(), storage.nbytes()
        if not self._users[pointer]:
            self.allocated += size
            self.reserved = max(self.reserved, self.allocated)
            self.peak = max(self.peak, self.allocated)
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._users[pointer] += 1
        weakref.finalize(owner, self._release, pointer, size).atexit = False

    def _release(self, pointer: int, size: int) -> None:
        self._users[pointer] -= 1
        if not self._users[pointer]:
            del self._users[pointer]
            self.allocated -= size

    def reset_peak(self) -> None:
        self.peak, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        self.reserved = self.allocated


class PretendedDevice:
    """Everything that happened on the device, in its order, since `clear`."""

    def __init__(self, total: int) -> None:
        self.memory = Memory(total)
        self.reads: list[Read] = []
        self.copies: list[Copy] = []
        self.conversions: list[Conversion] = []
        self.unordered: list[Unordered] = []
        self.stream_calls: list[StreamCall] = []
        self.streams = [Stream(0)]
        """The default stream, then the side streams that were made."""
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._current = threading.local()

    def clear(self) -> None:
        """Forgets what has happened; memory and streams stay."""
        for events in (self.reads, self.copies, self.conversions, self.unordered):
            events.clear()
        self.stream_calls.clear()

    @property
    def stream(self) -> "Stream":
        """The current stream, which each thread has for itself."""
        found: Stream = getattr(self._current, "stream", self.streams[0])
        return found

    @stream.setter
    def stream(self, stream: "Stream") -> None:
        self._current.stream = stream

    @contextmanager
    def in_stream(self, stream: "Stream | None") -> Iterator[None]:
        """Makes a stream the current one of this thread, as `torch.cuda.stream` does."""
        before = self.stream
        self.stream = stream or before
        try:
            yield
        finally:
            self.stream = before

    def new_stream(self, *_: Any, **__: Any) -> "Stream":
        stream = Stream(len(self.streams))
        self.streams.append(stream)
        return stream

    def pin(self, tensor: Tensor) -> Tensor:
        """Counts a tensor's memory as pinned, and keeps it, so that its address stays its own."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def read(self, operation: str) -> None:
        self.reads.append(Read(operation, site()))

    def copy(self, direction: str, source: Tensor, target: Tensor, *, non_blocking: bool) -> None:
        """Notes a copy between CPU tensors that stand for those of host and device.

        By the rules of `aten/src/ATen/native/cuda/Copy.cu`: contiguous or equally laid out tensors
        of one dtype cross as they are. Otherwise the source is made contiguous where it lies, and
        what arrives is laid out where the target lies; dtypes are converted on the host, or on the
        device if the copy is non-blocking.
        """
        to_device = direction == TO_DEVICE
        host = source if to_device else target
        same_dtype = source.dtype == target.dtype
        same_order = source.stride() == target.stride() and _is_dense(source)
        crossing = target if to_device != non_blocking else source
        converts = not same_dtype and not non_blocking
        lays_out = not (same_dtype and same_order) and not host.is_contiguous()
        self.copies.append(
            Copy(
                direction,
                bytes=source.numel() * crossing.element_size(),
                converted=target.nbytes if converts or lays_out else 0,
                pinned=self.is_pinned(host),
                non_blocking=non_blocking,
                stream=self.stream.number,
                site=site(),
            )
        )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps and overlaps, in any order of dimensions."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


class Stream:
    """A stream whose work is done at once, in the program's order; its calls are noted."""

    def __init__(self, number: int) -> None:
        self.number = self.cuda_stream = number
        self.device = torch.device("cuda:0")

    def note(self, operation: str) -> None:
        the_device().stream_calls.append(StreamCall(operation, self.number, site()))

    def wait_stream(self, stream: "Stream") -> None:
        self.note(f"wait_stream {stream.number}")

    def wait_event(self, event: "Event") -> None:
        self.note("wait_event")

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.note("synchronize")

    def query(self) -> bool:
        return True


class Event:
    """An event, which is over as soon as it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or the_device().stream
        self._stream.note("record_event")

    def wait(self, stream: Stream | None = None) -> None:
        (stream or the_device().stream).wait_event(self)

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.note("synchronize_event")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 0.0


_the_device = PretendedDevice(0)


def the_device() -> PretendedDevice:
    """The device that is pretended; outside of `use` one for the tensors that are left over."""
    return _the_device


@contextmanager
def use(device: PretendedDevice) -> Iterator[None]:
    """Makes a device the one that is pretended."""
    global _the_device
    before, _the_device = _the_device, device
    try:
        yield
    finally:
        _the_device = before
