"""Reading of a checkpoint's tensors one by one.

Opening reads only the headers. Reading copies a tensor's byte range into private memory, so that
a shard's memory is exactly the tensors it read, without mapped files.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.device.transport import CPU, fill
from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.headers import Entry, Headers, legible
from orchestrator.models.checkpoint.other_formats import check_format
from orchestrator.store.files import read_with
from orchestrator.store.places import Place

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def parse_dtype(name: str) -> torch.dtype | None:
    """Parse the name of a dtype, `bfloat16`; returns None for `auto`.

    Raises:
        UsageError: The name is not one of the floating-point dtypes of a checkpoint.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name == "auto":
        return None
    if name not in known or not known[name].is_floating_point:
        raise UsageError(f"dtype is {name!r}; allowed: auto, float32, bfloat16, float16, float64")
    return known[name]


class NamedShapes(Protocol):
    """Names, shapes and dtypes of tensors."""

    directory: Place
    """Directory of the model's config, named in errors."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...


class Checkpoint(NamedShapes, Protocol):
    """Named tensors with their headers, from files or not yet written."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    def origin(self, name: str) -> tuple[str, tuple[int, ...]] | None: ...

    def are_equal(self, one: str, other: str) -> bool: ...

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor: ...

    def read_ahead(self, names: Iterable[str]) -> None: ...


class Weights:
    """Tensors of a checkpoint directory, by their names on disk.

    Holds headers only; every `read` opens the file, reads one byte range and closes it.
    """

    def __init__(self, headers: Headers) -> None:
        self.directory = headers.directory
        self._headers = headers

    @classmethod
    def open(cls, directory: Place) -> "Weights":
        """Read and validate every header of the checkpoint in `directory`.

        Raises:
            InputError: As for `Headers.open`, or the model has another format.
        """
        try:
            return cls(Headers.open(directory))
        except InputError:
            check_format(directory)
            raise

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint, see `Headers`."""
        return self._headers.fingerprint

    @property
    def size_bytes(self) -> int:
        """Total size of all files."""
        return self._headers.size_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors on disk, in file order."""
        return tuple(self._headers.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._headers.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._headers.entries[name].code]

    def origin(self, name: str) -> None:
        """Return None: every tensor is stored under its name."""

    def are_equal(self, one: str, other: str) -> bool:
        """Compare two tensors; see `Headers`."""
        return self._headers.are_equal(one, other)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to prefetch tensors into its cache; no effect for files in a store."""
        for name in names:
            entry = self._headers.entries[name]
            if not isinstance(entry.path, Path):
                continue
            with suppress(OSError), entry.path.open("rb", buffering=0) as file:
                wanted = (entry.offset, entry.size_bytes, os.POSIX_FADV_WILLNEED)
                os.posix_fadvise(file.fileno(), *wanted)

    def read(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Read a tensor to a device, in its dtype on disk, into private memory of exactly its size.

        For a GPU the host holds one piece of it at a time.

        Raises:
            InputError: The file has become shorter, or cannot be read.
        """
        return self._read(name, self._headers.entries[name], device)

    def read_piece(
        self, name: str, index: int, shape: tuple[int, ...], device: torch.device = CPU
    ) -> torch.Tensor:
        """Read one of the equal pieces of adjoining values that a tensor consists of, as `read`.

        Args:
            index: Number of the piece.
            shape: Shape of every piece, `tensor.shape[1:]` for the entries of the tensor.
        """
        entry = self._headers.entries[name]
        piece = replace(entry, shape=shape)
        first = entry.offset + index * piece.size_bytes
        return self._read(name, replace(piece, offset=first), device)

    def _read(self, name: str, entry: Entry, device: torch.device) -> torch.Tensor:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.code], device=device)
        if not entry.size_bytes:
            return tensor

        def read(file: Any) -> int:
            file.seek(entry.offset)
            return fill(tensor, lambda buffer: _read_into(file, buffer))

        try:
            done = read_with(entry.path, read)
        except OSError as error:
            raise InputError(
                f"{entry.path}: cannot read {legible(name)}: {error.strerror}"
            ) from error
        if done < entry.size_bytes:
            raise InputError(
                f"{entry.path}: ended after {done} of the {entry.size_bytes} bytes of "
                f"{legible(name)}; the file was changed or is truncated"
            )
        return tensor


def fingerprint_of(directory: Place) -> str:
    """Return the fingerprint of a checkpoint; see `Headers`.

    Raises:
        InputError: As `Headers.open`.
    """
    return Weights.open(directory).fingerprint


def _read_into(file: Any, buffer: memoryview) -> int:
    """Fill a buffer from a file; returns the number of bytes, fewer at the end of the file."""
    done = 0
    while done < len(buffer):
        count: int = file.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


def first_float_dtype(weights: Checkpoint) -> torch.dtype:
    """Dtype of the first stored tensor with floating-point values.

    Raises:
        InputError: No tensor has any.
    """
    for name in weights.names:
        if weights.dtype(name).is_floating_point:
            return weights.dtype(name)
    raise InputError(f"{weights.directory}: no stored tensor has a floating-point dtype")
