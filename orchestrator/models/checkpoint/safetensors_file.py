"""Writing of safetensors files tensor by tensor, byte for byte as the safetensors library does.

A file consists of eight bytes N, N bytes of JSON with the location of each tensor, and the tensors.
The header depends only on names, dtypes and shapes, so it is written before any tensor is read.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from orchestrator.models.checkpoint.weights import DTYPES
from orchestrator.store.files import atomic, size_of
from orchestrator.store.places import Place

# the library's order, by alignment: every tensor starts at a multiple of its item size
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Announced: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor of a file, by name."""


def write_safetensors(
    path: Place,
    tensors: Announced,
    read: Callable[[str], Tensor | Iterator[Tensor]],
) -> str:
    """Write the file atomically, reading one tensor at a time; returns its BLAKE2b, 256 bits.

    Tensors are read in file order, not in the given order, and must have the announced dtype and
    shape; any device. An iterator gives a tensor in pieces, whose values adjoin. Memory: one
    tensor, or one piece. Equal tensors give equal bytes.

    Raises:
        OrchestratorError: The device has no space left, or refuses the write.
    """
    header = make_header(tensors)
    digest = hashlib.blake2b(header, digest_size=32)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in _in_order(tensors):
            _write_tensor(file, read(name), name=name, announced=tensors[name], digest=digest)
    return digest.hexdigest()


def _write_tensor(
    file: BinaryIO,
    given: Tensor | Iterator[Tensor],
    *,
    name: str,
    announced: tuple[torch.dtype, tuple[int, ...]],
    digest: hashlib.blake2b,
) -> None:
    """Write one tensor; a separate function, so that it is freed before the next is read."""
    if isinstance(given, Tensor):
        found = (given.dtype, tuple(given.shape))
        if found != announced:
            raise ValueError(f"{name} is {found}, but was announced as {announced}")
        _write_values(file, given, digest)
        return
    count = 0
    for piece in given:
        if piece.dtype != announced[0]:
            raise ValueError(f"a piece of {name} is {piece.dtype}, announced was {announced[0]}")
        count += piece.numel()
        _write_values(file, piece, digest)
    if count != math.prod(announced[1]):
        raise ValueError(f"{name} has {count} values, announced were {announced[1]}")


def _write_values(file: BinaryIO, tensor: Tensor, digest: hashlib.blake2b) -> None:
    if tensor.numel():
        data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        digest.update(data)
        file.write(data)


def has_header(path: Place, tensors: Announced) -> bool:
    """Test if `path` is a file of the expected size with the header of these tensors."""
    header = make_header(tensors)
    size_bytes = len(header) + sum(
        math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()
    )
    if not path.is_file() or size_of(path) != size_bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def make_header(tensors: Announced) -> bytes:
    """Build the bytes before the first tensor: the length, and the JSON padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _in_order(tensors):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = _CODES[dtype]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(tensors: Announced) -> list[str]:
    return sorted(tensors, key=lambda name: (_ORDER.index(_CODES[tensors[name][0]]), name))
