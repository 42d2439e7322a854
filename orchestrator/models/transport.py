"""Tensors on their way between the host and a GPU.

`Tensor.to(device, dtype)` from the host casts on the host, and copies between two layouts are
transposed there: a second or more for one weight of a large model, while the GPU waits. Here a
tensor is copied as it lies in memory, and is turned and cast where it arrives.

Copies go through page-locked ("pinned") memory, which the GPU reads and writes on its own. Its
owner is PyTorch's caching host allocator: a pinned tensor that is dropped while a copy still uses
it is given out again only after the event that `copy_` has recorded on that copy's stream
(`ATen/core/CachingHostAllocator.h`, "record_event").
"""

from collections.abc import Callable

import torch
from torch import Tensor

CPU = torch.device("cpu")
PIECE_BYTES = 2**25
"""Pinned memory of one copy of a large tensor: the next piece is read while it is copied."""


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
    """A contiguous tensor of the host on a GPU; the host goes on before the last piece is there."""
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    values = max(1, PIECE_BYTES // tensor.element_size())
    parts = (torch.split(each.view(-1), values) for each in (tensor, found))
    for piece, place in zip(*parts, strict=True):
        place.copy_(piece.pin_memory(), non_blocking=True)
    return found


def fill(tensor: Tensor, read: Callable[[memoryview], int]) -> int:
    """Fills a contiguous tensor with bytes, in place; gives how many there were.

    Args:
        tensor: On any device. On a GPU the bytes come in pieces, and one is copied while the next
            is read.
        read: Puts bytes into a buffer and gives their number, which is less at the end alone.
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
