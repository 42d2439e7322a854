"""Validation of a checkpoint's safetensors files from their headers, without reading tensors.

A safetensors file consists of eight bytes N (little-endian), N bytes of JSON with every tensor's
dtype, shape and byte range, and the tensors. This module does not need torch.
"""

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.store.files import parse_json, read_with, size_of
from orchestrator.store.places import Place

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""Ends of the names of files with weights; only safetensors are read."""
SAMPLE_BYTES = 128
PIECE_BYTES = 2**24

ITEMSIZES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per value, by the format's dtype name."""

MAX_HEADER_BYTES = 100_000_000
"""Header limit of the format; a larger length means a damaged file."""
MAX_DIMENSIONS = 64
"""Limit of numpy and of torch's loops."""
MAX_VALUES = 2**59
"""Limit of a tensor's values, not counting dimensions of size zero; numpy can index its bytes."""

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 200


@dataclass(frozen=True, slots=True)
class Entry:
    """Location of one tensor: its file, dtype, shape, and first byte in the file."""

    path: Place
    code: str
    """Dtype name of the format, `BF16`."""
    shape: tuple[int, ...]
    offset: int

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.values * ITEMSIZES[self.code]


@dataclass(frozen=True, slots=True)
class HeaderFile:
    """Header of one safetensors file: file size, header hash, and tensors."""

    size_bytes: int
    header_hash: str
    entries: dict[str, Entry]


class Headers:
    """Dtypes, shapes and locations of a checkpoint's tensors, by their names on disk."""

    def __init__(self, directory: Place, files: Mapping[str, HeaderFile], config: Any) -> None:
        self.directory = directory
        self.config = config
        self.entries = {name: e for file in files.values() for name, e in file.entries.items()}
        self.size_bytes = sum(file.size_bytes for file in files.values())
        """Total size of all files, headers included."""
        self._identity = [config, [[n, f.size_bytes, f.header_hash] for n, f in files.items()]]

    @classmethod
    def open(cls, directory: Place) -> "Headers":
        """Read and validate every header of the checkpoint in `directory`.

        Raises:
            InputError: Config or safetensors are missing; a file is missing, truncated or damaged;
                the index does not match the files or names a file outside the directory.
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
                    f"{directory}: {INDEX_FILE} names {legible(name)}, which does not exist"
                )
            files[name] = _read_header(directory / name)
        _check_index(directory, weight_map, files)
        return cls(directory, files, config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config, of every file's name, size and header, and of samples of all tensors.

        A few hundred bytes of each tensor distinguish two trainings of one model, which have equal
        headers, without reading the whole checkpoint.

        Raises:
            InputError: A file cannot be read.
        """
        text = json.dumps(self._identity, sort_keys=True, separators=(",", ":"))
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        by_file = sorted(self.entries.values(), key=lambda entry: (entry.path.name, entry.offset))
        for path, entries in groupby(by_file, key=lambda entry: entry.path):
            for sample in _read_samples(path, list(entries)):
                digest.update(sample)
        return digest.hexdigest()

    def are_equal(self, one: str, other: str) -> bool:
        """Compare two tensors by dtype, shape and bytes; reads both in pieces up to a difference.

        Samples of both are compared first, because tensors that differ mostly do so everywhere.

        Raises:
            InputError: A file cannot be read.
        """
        first, second = self.entries[one], self.entries[other]
        if (first.code, first.shape) != (second.code, second.shape):
            return False
        if _read_samples(first.path, [first]) != _read_samples(second.path, [second]):
            return False
        return all(
            _read_piece(first, start) == _read_piece(second, start)
            for start in range(0, first.size_bytes, PIECE_BYTES)
        )


def _read_piece(entry: Entry, start: int) -> bytes:
    """Read up to `PIECE_BYTES` of a tensor from a byte on."""

    def read(file: Any) -> bytes:
        file.seek(entry.offset + start)
        content: bytes = file.read(min(PIECE_BYTES, entry.size_bytes - start))
        return content

    try:
        return read_with(entry.path, read)
    except OSError as error:
        raise InputError(f"{entry.path}: cannot read: {error.strerror}") from error


def _read_samples(path: Place, entries: Sequence[Entry]) -> list[bytes]:
    try:
        return read_with(path, partial(_samples, entries))
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error


def _samples(entries: Sequence[Entry], file: Any) -> list[bytes]:
    """Read a few bytes of every tensor."""
    samples = []
    for entry in entries:
        last = max(entry.size_bytes - SAMPLE_BYTES, 0)
        for start in sorted({0, last // 3, 2 * last // 3, last}):
            file.seek(entry.offset + start)
            samples.append(file.read(min(SAMPLE_BYTES, entry.size_bytes)))
    return samples


def read_json(path: Place) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        InputError: The file is missing, is not JSON, or does not contain an object.
    """
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file; a checkpoint needs it as a file")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name}; a checkpoint needs one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; a JSON object is expected")
    return value


def quoted(value: Any) -> str:
    """Format a value found in a file for a message, in one line of limited length."""
    return _BRIEF.repr(value)


def legible(name: str) -> str:
    """Format a name for a message, quoted only if necessary."""
    return name if name.isprintable() and len(name) <= _BRIEF.maxstring else quoted(name)


def _is_file(path: Place) -> bool:
    try:
        return path.is_file()
    except OSError:  # name too long
        return False


def has_weights(directory: Place) -> bool:
    """Test if a directory has files with weights, readable or not."""
    return any(path.name.endswith((*WEIGHT_SUFFIXES, INDEX_FILE)) for path in directory.iterdir())


def _no_weights(directory: Place) -> str:
    names = sorted(path.name for path in directory.iterdir())
    others = [name for name in names if name.endswith(WEIGHT_SUFFIXES[1:])]
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors:
        return (
            f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}, but {', '.join(safetensors[:3])}"
            "; several files need an index"
        )
    if others:
        return (
            f"{directory}: no safetensors, only {', '.join(others[:3])}; "
            "convert them with save_pretrained first, pickled weights are not read"
        )
    return f"{directory}: no weights; {SINGLE_FILE} or {INDEX_FILE} is expected"


def _read_weight_map(path: Place) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map; it maps every tensor to its file")
    for tensor, name in weight_map.items():
        # A bare name only: an index must not refer to files outside its directory.
        is_bare = isinstance(name, str) and name == os.path.basename(name) and "\\" not in name
        if not is_bare or not name.endswith(".safetensors"):
            raise InputError(
                f"{path}: {legible(tensor)} is in {quoted(name)}; "
                "only a safetensors file of the same directory is allowed"
            )
    return weight_map


def _check_index(
    directory: Place, weight_map: Mapping[str, str], files: dict[str, HeaderFile]
) -> None:
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise InputError(
                f"{directory}: {INDEX_FILE} places {legible(tensor)} in {name}, which lacks it"
            )
    for name, file in files.items():
        for tensor in file.entries:
            if weight_map.get(tensor) != name:
                raise InputError(
                    f"{directory}: {name} holds {legible(tensor)}, which {INDEX_FILE} "
                    + (f"places in {weight_map[tensor]}" if tensor in weight_map else "lacks")
                )


def _read_header(path: Place) -> HeaderFile:
    try:
        size_bytes = size_of(path)

        def read(file: Any) -> bytes:
            length_bytes = file.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or length > min(size_bytes - 8, MAX_HEADER_BYTES):
                raise InputError(
                    f"{path}: {size_bytes} bytes, header of {length} bytes expected; "
                    "the file is truncated or not safetensors"
                )
            content: bytes = file.read(length)
            return content

        header = read_with(path, read)
        length = len(header)
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
    return HeaderFile(size_bytes, digest, entries)


def _read_entry(path: Place, name: str, value: Any, *, first_byte: int) -> Entry:
    try:
        code, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        is_sound = (
            isinstance(code, str) and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        )
        is_sound = is_sound and all(type(n) is int and 0 <= n < 2**63 for n in [start, end, *shape])
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound or math.prod(n for n in shape if n) > MAX_VALUES:
        raise InputError(f"{path}: damaged header, entry of {legible(name)} is {quoted(value)}")
    if code not in ITEMSIZES:
        raise InputError(
            f"{path}: {legible(name)} has dtype {quoted(code)}; allowed are {', '.join(ITEMSIZES)}"
        )
    entry = Entry(path, code, tuple(shape), first_byte + start)
    if end - start != entry.size_bytes:
        raise InputError(
            f"{path}: damaged header, {legible(name)} of shape {shape} and dtype {code} takes "
            f"{entry.size_bytes} bytes, but its range has {end - start}"
        )
    return entry


def _check_ranges(
    path: Place, entries: Mapping[str, Entry], *, first_byte: int, size_bytes: int
) -> None:
    """Check that ranges are contiguous, without overlap, and end at the end of the file."""
    position = first_byte
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[0])):
        if entry.offset != position and entry.size_bytes:
            raise InputError(
                f"{path}: damaged header, {legible(name)} starts at byte {entry.offset}, "
                f"but the preceding tensor ends at {position}"
            )
        position += entry.size_bytes
    if position != size_bytes:
        state = "truncated" if position > size_bytes else "damaged"
        raise InputError(
            f"{path}: {size_bytes} bytes, but its header describes {position}; the file is {state}"
        )
