"""Tensors on their way between the host and a GPU.

`Tensor.to(device, dtype)` from the host casts on the host, and copies between two layouts are
transposed there: a second or more for one weight of a large model, while the GPU waits. Here a
tensor is copied as it lies in memory, and is turned and cast where it arrives.

Chunks go both ways on streams of their own, beside the one that computes: the next is brought while
one is computed, and the one before is taken away (`bring`, `Departure`). Nothing here makes the
host wait for the device but `Departure.wait`.

Copies go through page-locked ("pinned") memory, which the GPU reads and writes on its own. Its
owner is PyTorch's caching host allocator: a pinned tensor that is dropped while a copy still uses
it is given out again only after the event that `copy_` has recorded on that copy's stream
(`ATen/core/CachingHostAllocator.h`, "record_event"). Memory of the GPU that is used on two streams
is guarded by `Tensor.record_stream`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")
PIECE_BYTES = 2**25
"""Pinned memory of one copy of a large tensor: the next piece is read while it is copied."""


@dataclass(frozen=True, slots=True)
class _Lanes:
    """The streams of a GPU on which chunks are copied."""

    up: torch.cuda.Stream
    down: torch.cuda.Stream


def _lanes(device: torch.device) -> _Lanes:
    return lanes_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def lanes_of(index: int) -> _Lanes:
    device = torch.device("cuda", index)
    return _Lanes(*(torch.cuda.Stream(device) for _ in range(2)))  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    """An event whose waiters sleep, so that the thread that computes has the core."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, concurrent with the work that a GPU has queued.

    Work that is queued later waits for the copy. The tensor may be dropped or changed at once if it
    is not pinned; a pinned one must not be changed before the copy has ended.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    up, computing = _lanes(device).up, torch.cuda.current_stream(device)
    with torch.cuda.stream(up):
        found = tensor.pin_memory().to(device, non_blocking=True)
    computing.wait_stream(up)
    # allocated for the stream that copies, used by the one that computes
    found.record_stream(computing)
    return found


class Departure:
    """Tensors that leave a GPU for the host while it computes; read them after `wait`."""

    def __init__(self) -> None:
        self._left: torch.cuda.Event | None = None

    def host(self, tensor: Tensor) -> Tensor:
        """The tensor's copy on the host: itself if it is there, else pinned memory, see `wait`."""
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
        """Waits until all of them are there; from any thread."""
        if self._left is not None:
            self._left.synchronize()


class Pace:
    """Keeps the host at most one step ahead of a GPU, so that few chunks are in its memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given: torch.cuda.Event | None = None

    def step(self) -> None:
        """Before a step: waits until the device has done the one before the last."""
        if self._device.type == "cpu":
            return
        before, stream = self._given, torch.cuda.current_stream(self._device)
        self._given = stream.record_event(_event())
        if before is not None:
            before.synchronize()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, contiguous, in its own dtype; cast it there.

    A matrix that is a transposed view is transposed on the device. On the tensor's own device it
    is `Tensor.contiguous`.
    """
    if device.type == "cpu" or tensor.device.type != "cpu" or not tensor.numel():
        return tensor.to(device).contiguous()
    if tensor.dim() == 2 and tensor.T.is_contiguous():
        return _copied(tensor.T, device).T.contiguous()
    return _copied(tensor.contiguous(), device)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous host tensor on a GPU; returns before the last piece has been copied."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    values = max(1, PIECE_BYTES // tensor.element_size())
    parts = (torch.split(each.view(-1), values) for each in (tensor, found))
    for piece, place in zip(*parts, strict=True):
        place.copy_(piece.pin_memory(), non_blocking=True)
    return found


def download(tensor: Tensor) -> Tensor:
    """The tensor on the host, in ordinary memory; one that is there is given as it is.

    For large or long-lived tensors: a pinned one takes the next power of two in bytes, which
    PyTorch keeps. A piece is moved on while the next one leaves the GPU.
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
    """Fills a contiguous tensor with bytes, in place; gives their number.

    Args:
        tensor: On any device. On a GPU the bytes come in pieces, and one is copied while the next
            is read.
        read: Puts bytes into a buffer and gives their number; fewer than fit only at the end.
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
