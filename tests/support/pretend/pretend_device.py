"""Record of a simulated CUDA device: reads, copies, memory, streams; see `pretend`."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from pretend_site import Site, site
from pretend_streams import Order, arrive_later, leave_until_then
from torch import Tensor

TO_DEVICE, TO_HOST = "to device", "to host"


class Read(NamedTuple):
    """A wait of the host for a value of the device."""

    operation: str
    site: Site


class Copy(NamedTuple):
    """A transfer between host and device."""

    direction: str
    """`TO_DEVICE` or `TO_HOST`."""
    bytes: int
    """Bytes that cross the bus."""
    converted: int
    """Bytes that the host writes in addition, for another dtype or another order."""
    pinned: bool
    non_blocking: bool
    stream: int
    """Number of the current stream; 0 is the default one."""
    site: Site


class Conversion(NamedTuple):
    """A copy of a host tensor, on the host, in another dtype or order."""

    operation: str
    bytes: int
    site: Site


class Unordered(NamedTuple):
    """An operation without a fixed order of its sums."""

    operation: str
    in_backward: bool
    site: Site


@dataclass(slots=True)
class Memory:
    """Bytes of the device's living tensors, without temporaries inside an operation."""

    total: int
    order: Order
    allocated: int = 0
    peak: int = 0
    reserved: int = 0
    """Bytes that torch's allocator would hold: the most allocated since `empty_cache`."""
    peak_reserved: int = 0
    _users: Counter[int] = field(default_factory=Counter)

    def hold(self, owner: object, storage: torch.UntypedStorage) -> None:
        """Count a storage while an owner lives, once for all its owners.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        pointer, size = storage.data_ptr(), storage.nbytes()
        if not self._users[pointer]:
            if self.allocated + size > self.total:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has a total "
                    f"capacity of {self.total} bytes of which {self.total - self.allocated} bytes "
                    f"are free. ({site()})"
                )
            self.order.allocate(pointer, size)
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
            self.order.free(pointer, size)

    def reset_peak(self) -> None:
        self.peak, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        self.reserved = self.allocated


class PretendedDevice:
    """The events of the device since `clear`, in their order."""

    def __init__(self, total: int) -> None:
        self.order = Order()
        self.memory = Memory(total, self.order)
        self.reads: list[Read] = []
        self.copies: list[Copy] = []
        self.conversions: list[Conversion] = []
        self.unordered: list[Unordered] = []
        self.stream_calls = self.order.calls
        self._pinned: dict[int, torch.UntypedStorage] = {}

    def clear(self) -> None:
        """Empty the lists; memory and streams stay."""
        for events in (self.reads, self.copies, self.conversions, self.unordered):
            events.clear()
        self.stream_calls.clear()

    def pin(self, tensor: Tensor) -> Tensor:
        """Count a tensor's memory as pinned, and keeps it, so that no other gets its address."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def read(self, operation: str) -> None:
        """Note a wait of the host for a value of the current stream."""
        self.reads.append(Read(operation, site()))
        self.order.wait(self.order.stream.past)

    def copy(self, direction: str, source: Tensor, target: Tensor, *, non_blocking: bool) -> None:
        """Note a copy, given the CPU tensors of both sides.

        By the rules of `aten/src/ATen/native/cuda/Copy.cu`: tensors of one dtype that are
        contiguous or have equal strides cross as they are. Otherwise the source becomes contiguous
        on its side, and the target takes its strides on the other; a dtype is converted on the
        host, or on the device if the copy is non-blocking.
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
                stream=self.order.stream.number,
                site=site(),
            )
        )
        if not (non_blocking and self.is_pinned(host)):
            self.order.wait(self.order.stream.past)
        elif to_device:
            leave_until_then(self.order, source, site())
        else:
            arrive_later(self.order, target)


def _is_dense(tensor: Tensor) -> bool:
    """True if a tensor fills its memory without gaps and overlaps, in any order of dimensions."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


_the_device = PretendedDevice(sys.maxsize)


def the_device() -> PretendedDevice:
    """The pretended device; outside of `use` one for left-over tensors."""
    return _the_device


@contextmanager
def use(device: PretendedDevice) -> Iterator[None]:
    """Make a device the pretended one, and synchronises with it at the end."""
    global _the_device
    before, _the_device = _the_device, device
    try:
        yield
        device.order.wait_for_all()
    finally:
        _the_device = before
