"""The safetensors files of a checkpoint: validated from their headers, read tensor by tensor.

A safetensors file is eight bytes N (little-endian), N bytes of JSON that give every tensor's dtype,
shape and byte range, then the tensors. Opening reads the headers alone; reading takes a
tensor's own byte range into private memory, so a shard's memory is exactly what it read and
nothing depends on the file staying mapped.
"""

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from orchestrator.errors import InputError, UsageError
from orchestrator.store.files import parse_json, size_of
from orchestrator.store.places import Place

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAMPLE_BYTES = 128

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

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format; a longer one is a damaged length."""
MAX_DIMENSIONS = 64
"""The limit of numpy and of torch's loops."""
MAX_VALUES = 2**59
"""Of a tensor, counted without its dimensions of zero: its bytes are a number that numpy has."""


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of this name, `bfloat16`; None for `auto`.

    Raises:
        UsageError: It is the name of no dtype that a checkpoint can have.
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name == "auto":
        return None
    if name not in known or not known[name].is_floating_point:
        raise UsageError(f"dtype is {name!r}; it must be auto, float32, bfloat16, float16, float64")
    return known[name]


class Checkpoint(Protocol):
    """Named tensors with the headers that say what they are, written to files or not yet."""

    directory: Place
    """Of the model's config, and what errors name."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies: its file, dtype, shape, and first byte in the file."""

    path: Place
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _File:
    """One safetensors file: its size, the hash of its header, and its tensors."""

    size_bytes: int
    header_hash: str
    entries: dict[str, _Entry]


class Weights:
    """The tensors of a checkpoint directory, by their names on disk.

    Holds headers only; every `read` opens the file, takes one byte range and closes it.
    """

    def __init__(self, directory: Place, files: Mapping[str, _File], config: Any) -> None:
        self.directory = directory
        self._entries = {name: e for file in files.values() for name, e in file.entries.items()}
        self._identity = [config, [[n, f.size_bytes, f.header_hash] for n, f in files.items()]]

    @classmethod
    def open(cls, directory: Place) -> "Weights":
        """Reads and checks every header of the checkpoint in `directory`.

        Raises:
            InputError: no config or no safetensors; a file that is missing, truncated or damaged;
                an index that does not agree with the files or points outside the directory.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give the directory of a checkpoint")
        config = read_json(directory / "config.json")
        if (directory / SINGLE_FILE).exists():
            return cls(directory, {SINGLE_FILE: _read_header(directory / SINGLE_FILE)}, config)
        if not (directory / INDEX_FILE).exists():
            raise InputError(_no_weights(directory))
        weight_map = _read_weight_map(directory / INDEX_FILE)
        files = {}
        for name in sorted(set(weight_map.values())):
            if not _is_file(directory / name):
                raise InputError(
                    f"{directory}: {INDEX_FILE} names {shown(name)}, which is not there"
                )
            files[name] = _read_header(directory / name)
        _check_index(directory, weight_map, files)
        return cls(directory, files, config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config, of every file's name, size and header, and of samples of all tensors.

        A few hundred bytes of each tensor tell two trainings of one model apart, which no header
        does, without reading the whole checkpoint.

        Raises:
            InputError: a file cannot be read.
        """
        text = json.dumps(self._identity, sort_keys=True, separators=(",", ":"))
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        by_file = sorted(self._entries.values(), key=lambda entry: (entry.path.name, entry.offset))
        for path, entries in groupby(by_file, key=lambda entry: entry.path):
            try:
                with path.open("rb", buffering=0) as file:
                    for entry in entries:
                        last = max(entry.size_bytes - SAMPLE_BYTES, 0)
                        for start in sorted({0, last // 3, 2 * last // 3, last}):
                            file.seek(entry.offset + start)
                            digest.update(file.read(min(SAMPLE_BYTES, entry.size_bytes)))
            except OSError as error:
                raise InputError(f"{path}: cannot read: {error.strerror}") from error
        return digest.hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name on disk, in the order of the files."""
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its dtype on disk, on the CPU, in private memory of its own size.

        Raises:
            InputError: the file has become shorter, or cannot be read.
        """
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if not entry.size_bytes:
            return tensor
        buffer = tensor.view(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                while done < entry.size_bytes:
                    count = file.readinto(buffer[done:])
                    if not count:
                        break
                    done += count
        except OSError as error:
            raise InputError(
                f"{entry.path}: cannot read {shown(name)}: {error.strerror}"
            ) from error
        if done < entry.size_bytes:
            raise InputError(
                f"{entry.path}: ended after {done} of the {entry.size_bytes} bytes of "
                f"{shown(name)}; the file was changed or is truncated"
            )
        return tensor


def read_json(path: Place) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():
            raise InputError(f"{path}: is no file; a checkpoint has one")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name}; a checkpoint has one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; a JSON object is expected")
    return value


def quoted(value: Any) -> str:
    """What was found in somebody's file, for a message: one line, however long it is."""
    return _BRIEF.repr(value)


def shown(name: str) -> str:
    """The same of a name, without quotes where it needs none."""
    return name if name.isprintable() and len(name) <= _BRIEF.maxstring else quoted(name)


def _is_file(path: Place) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any
        return False


def _no_weights(directory: Place) -> str:
    names = sorted(path.name for path in directory.iterdir())
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors:
        return (
            f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}, but {', '.join(safetensors[:3])}"
            "; several files need their index"
        )
    if others:
        return (
            f"{directory}: no safetensors, only {', '.join(others[:3])}; "
            "convert with save_pretrained first, pickled weights are not read"
        )
    return f"{directory}: no weights; {SINGLE_FILE} or {INDEX_FILE} is expected"


def _read_weight_map(path: Place) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map; it maps every tensor to its file")
    for tensor, name in weight_map.items():
        # A bare name only: an index must not lead out of the directory it lies in.
        is_bare = isinstance(name, str) and name == os.path.basename(name) and "\\" not in name
        if not is_bare or not name.endswith(".safetensors"):
            raise InputError(
                f"{path}: {shown(tensor)} lies in {quoted(name)}; "
                "only a safetensors file of the same directory is allowed"
            )
    return weight_map


def _check_index(directory: Place, weight_map: Mapping[str, str], files: dict[str, _File]) -> None:
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise InputError(
                f"{directory}: {INDEX_FILE} places {shown(tensor)} in {name}, not in there"
            )
    for name, file in files.items():
        for tensor in file.entries:
            if weight_map.get(tensor) != name:
                raise InputError(
                    f"{directory}: {name} holds {shown(tensor)}, which {INDEX_FILE} "
                    + (f"places in {weight_map[tensor]}" if tensor in weight_map else "lacks")
                )


def _read_header(path: Place) -> _File:
    try:
        size_bytes = size_of(path)
        with path.open("rb") as file:
            length_bytes = file.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
                raise InputError(
                    f"{path}: {size_bytes} bytes, header of {length} bytes expected; "
                    "the file is truncated or not safetensors"
                )
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    try:
        content = parse_json(header)
    except ValueError as error:
        raise InputError(f"{path}: damaged header, not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: damaged header, holds a {type(content).__name__}")
    content.pop("__metadata__", None)
    entries = {
        name: _read_entry(path, name, value, first_byte=8 + length)
        for name, value in content.items()
    }
    _check_ranges(path, entries, first_byte=8 + length, size_bytes=size_bytes)
    digest = hashlib.blake2b(header, digest_size=16).hexdigest()
    return _File(size_bytes, digest, entries)


def _read_entry(path: Place, name: str, value: Any, *, first_byte: int) -> _Entry:
    try:
        code, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        is_sound = (
            isinstance(code, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        )
        is_sound = is_sound and all(type(n) is int and 0 <= n < 2**63 for n in [start, end, *shape])
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound or math.prod(n for n in shape if n) > MAX_VALUES:
        raise InputError(f"{path}: damaged header, entry of {shown(name)} is {quoted(value)}")
    if code not in DTYPES:
        raise InputError(
            f"{path}: {shown(name)} has dtype {quoted(code)}; allowed are {', '.join(DTYPES)}"
        )
    entry = _Entry(path, DTYPES[code], tuple(shape), first_byte + start)
    if end - start != entry.size_bytes:
        raise InputError(
            f"{path}: damaged header, {shown(name)} of shape {shape} and dtype {code} takes "
            f"{entry.size_bytes} bytes, its range has {end - start}"
        )
    return entry


def _check_ranges(
    path: Place, entries: Mapping[str, _Entry], *, first_byte: int, size_bytes: int
) -> None:
    """Ranges must follow each other without gap or overlap and end where the file ends."""
    position = first_byte
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[0])):
        if entry.offset != position and entry.size_bytes:
            raise InputError(
                f"{path}: damaged header, {shown(name)} starts at byte {entry.offset}, "
                f"the tensor before it ends at {position}"
            )
        position += entry.size_bytes
    if position != size_bytes:
        state = "truncated" if position > size_bytes else "damaged"
        raise InputError(
            f"{path}: {size_bytes} bytes, its header describes {position}; the file is {state}"
        )
