"""Copies of tensors between host and GPU.

`Tensor.to(device, dtype)` from the host casts on the host, and copies between different layouts
transpose there: a second or more for one weight of a large model, while the GPU waits. The
functions here copy a tensor in its memory layout, and transpose and cast it on the target device.

Chunks are copied in both directions on separate CUDA streams: while one chunk is computed, the next
is copied in (`bring`) and the previous one out (`Departure`). Only `Departure.wait` makes the host
wait for the device.

Copies use page-locked ("pinned") memory, which the GPU accesses directly. It is owned by PyTorch's
caching host allocator: the memory of a pinned tensor released during a copy is reused only after
the event that `copy_` has recorded on the stream of that copy (`ATen/core/CachingHostAllocator.h`,
"record_event"). GPU memory that is used on two streams is protected by `Tensor.record_stream`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")
PIECE_BYTES = 2**25
"""Size of the pinned buffer for copies of large tensors: the next piece is read while one is
copied."""


@dataclass(frozen=True, slots=True)
class _Lanes:
    """CUDA streams on which chunks are copied."""

    up: torch.cuda.Stream
    down: torch.cuda.Stream


def _lanes(device: torch.device) -> _Lanes:
    return lanes_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def lanes_of(index: int) -> _Lanes:
    device = torch.device("cuda", index)
    return _Lanes(*(torch.cuda.Stream(device) for _ in range(2)))  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    """Create an event whose waiters sleep, so that the computing thread has the core."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, concurrently with the work queued on a GPU.

    Work queued later waits for the copy. A tensor that is not pinned may be released or changed at
    once; a pinned one must not be changed before the end of the copy.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    up, computing = _lanes(device).up, torch.cuda.current_stream(device)
    with torch.cuda.stream(up):
        found = tensor.pin_memory().to(device, non_blocking=True)
    computing.wait_stream(up)
    # allocated on the copying stream, used by the computing one
    found.record_stream(computing)
    return found


class Departure:
    """Copies of tensors from a GPU to the host, concurrent with computation; readable after
    `wait`."""

    def __init__(self) -> None:
        self._left: torch.cuda.Event | None = None

    def host(self, tensor: Tensor) -> Tensor:
        """Return a copy on the host: the tensor itself if it is on the host, else pinned memory
        filled by `wait`."""
        if tensor.device.type == "cpu":
            return tensor
        down = _lanes(tensor.device).down
        down.wait_stream(torch.cuda.current_stream(tensor.device))
        found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(down):
            found.copy_(tensor, non_blocking=True)
        tensor.record_stream(down)
        self._left = down.record_event(_event())
        return found

    def wait(self) -> None:
        """Wait until all copies are complete; may be called from any thread."""
        if self._left is not None:
            self._left.synchronize()


class Pace:
    """Limiter that keeps the host at most one step ahead of a GPU, so that few chunks are in its
    memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: torch.cuda.Event | None = None

    def step(self) -> None:
        """Wait, before a step, until the device has finished the step before the last."""
        if self._device.type == "cpu":
            return
        before, stream = self._given, torch.cuda.current_stream(self._device)
        self._given = stream.record_event(_event())
        if before is not None:
            before.synchronize()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy the tensor to `device`, contiguous and in its dtype; casts should follow there.

    A transposed view is transposed on the device. If the tensor is already on the device this is
    `Tensor.contiguous`.
    """
    if device.type == "cpu" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device).contiguous()
    if tensor.dim() == 2 and tensor.T.is_contiguous():
        return _copied(tensor.T, device).T.contiguous()
    return _copied(tensor.contiguous(), device)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a contiguous host tensor to a GPU; returns before the last piece has been copied."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    values = max(1, PIECE_BYTES // tensor.element_size())
    parts = (torch.split(each.view(-1), values) for each in (tensor, found))
    for piece, place in zip(*parts, strict=True):
        place.copy_(piece.pin_memory(), non_blocking=True)
    return found


def download(tensor: Tensor) -> Tensor:
    """Copy the tensor to ordinary memory of the host; a host tensor is returned unchanged.

    For large or long-lived tensors: pinned memory takes the next power of two in bytes, which
    PyTorch keeps. Each piece is copied from the pinned buffer while the next one leaves the GPU.
    """
    if tensor.device.type == "cpu":
        return tensor
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    values = max(1, PIECE_BYTES // tensor.element_size())
    parts = (torch.split(each.view(-1), values) for each in (tensor.contiguous(), found))
    leaving: list[tuple[Departure, Tensor, Tensor]] = []
    for piece, place in zip(*parts, strict=True):
        departure = Departure()
        leaving.append((departure, departure.host(piece), place))
        if len(leaving) > 1:
            _arrive(*leaving.pop(0))
    for each in leaving:
        _arrive(*each)
    return found


def _arrive(departure: Departure, left: Tensor, place: Tensor) -> None:
    departure.wait()
    place.copy_(left)


def fill(tensor: Tensor, read: Callable[[memoryview], int]) -> int:
    """Fill a contiguous tensor with bytes, in place; returns their number.

    Args:
        tensor: On any device. For a GPU the bytes are read in pieces; one is copied while the next
            is read.
        read: Writes bytes into a buffer and returns their number; a buffer is only partly filled at
            the end.
    """
    bytes_B = tensor.view(-1).view(torch.uint8)
    if tensor.device.type == "cpu":
        return read(bytes_B.numpy().data)
    done = 0
    for place in torch.split(bytes_B, PIECE_BYTES):
        piece = torch.empty(len(place), dtype=torch.uint8, pin_memory=True)
        count = read(piece.numpy().data)
        place.copy_(piece, non_blocking=True)
        done += count
        if count < len(place):
            break
    return done
