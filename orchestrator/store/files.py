"""Atomic writes, and reads with retries.

On local disk a file is written under a temporary name, synced and renamed. For an object store it
is written to a local disk of this node and then uploaded; objects appear atomically.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import OrchestratorError
from orchestrator.store.cache import process_cache, temporary_file
from orchestrator.store.places import Place, Remote
from orchestrator.store.storage_errors import patiently

Result = TypeVar("Result")

MAX_NESTING = 100
"""Maximum nesting of JSON that is read: Python's own functions fail for values of about 1000
levels."""
_READ_BYTES = 1 << 22
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")


@contextmanager
def atomic(path: Place, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary local name; the file written there atomically becomes `path`.

    If the body raises, the temporary file is removed and `path` is unchanged. Concurrent writers of
    one path are safe: the last one wins.

    Args:
        durable: Sync the content to disk before the rename. Without it, a crash of the machine (not
            of the process) may leave an empty file. Objects of a store are always durable.

    Raises:
        OrchestratorError: The device is full or refuses the write, or the store does.
    """
    try:
        if isinstance(path, Remote):
            with temporary_file(f"-{path.name}") as temporary:
                yield temporary
                path.upload(temporary)
        else:
            with _renamed(path, durable) as temporary:
                yield temporary
    except Exception as error:
        if (refused := _system_error(error)) is None:
            raise
        where = f"{path}: cannot be written"
        if isinstance(path, Remote) and refused.errno == errno.ENOSPC:
            where += ", the local copy does not fit under TMPDIR"
        # a parent that is a file "exists" already
        is_below_file = refused.errno == errno.EEXIST
        reason = os.strerror(errno.ENOTDIR) if is_below_file else refused.strerror or refused
        raise OrchestratorError(
            f"{where}: {reason}; free or choose another place, then run the same command again"
        ) from error


@contextmanager
def _renamed(path: Path, durable: bool) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        patiently(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        yield temporary
        if durable:
            # not retried after a failure: the kernel then reports the lost data as written
            _fsync(temporary)
        patiently(lambda: os.replace(temporary, path))
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _system_error(error: Exception) -> OSError | None:
    """Return the system's error, also from safetensors, which gives its number in the text only."""
    if isinstance(error, OSError):
        return error
    found = _RUST_ERROR.search(str(error))
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))


def write_whole(path: Place, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Write as `atomic` with a repeatable body, which is retried on transient errors.

    Raises:
        OrchestratorError: As `atomic`.
    """
    with atomic(path, durable=durable) as temporary:
        patiently(lambda: write(temporary))


def write_json(path: Place, value: Any, *, durable: bool = True, indent: int | None = 1) -> None:
    """Write `value` as sorted JSON, atomically; equal values give equal bytes.

    Args:
        durable: As for `atomic`.
        indent: None writes one line, which is ten times as fast in Python.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"), durable=durable)


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text in UTF-8 from an untrusted source.

    Raises:
        ValueError: The text is not JSON, or its value cannot be written again: nesting deeper than
            `MAX_NESTING`, or a lone surrogate in a string.
    """
    decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(decoded)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_NESTING} deep") from None
    level, depth = _nested([[value]]), 0
    while level:
        level, depth = _nested(level), depth + 1
        if depth > MAX_NESTING:
            raise ValueError(f"nested more than {MAX_NESTING} deep")
    if _SURROGATE.search(decoded):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _nested(values: list[Any]) -> list[Any]:
    """Return the objects and arrays directly inside objects and arrays."""
    return [
        inner
        for each in values
        for inner in (each.values() if type(each) is dict else each)
        if type(inner) in (dict, list)
    ]


def read_bytes(path: Place) -> bytes:
    """Read the content; retries on transient errors.

    Raises:
        OSError: The file does not exist, or the disk fails; errors of a store are those of
            `Remote`.
    """
    return path.read_bytes() if isinstance(path, Remote) else patiently(path.read_bytes)


@contextmanager
def local_copy(path: Place) -> Iterator[Path]:
    """Yield a local path to the content: the file itself, or a copy that is removed afterwards.

    Raises:
        FileNotFoundError: The object does not exist.
    """
    if isinstance(path, Path):
        yield path
        return
    with temporary_file(f"-{path.name}") as temporary:
        path.download(temporary)
        yield temporary


def read_with(path: Place, read: Callable[[Any], Result]) -> Result:
    """Call `read` with the open file and return its result; for a store it may be called again.

    Raises:
        OSError: As for opening and reading.
        OrchestratorError: The store does not respond.
    """
    if isinstance(path, Remote):
        return path.read_with(read)
    with path.open("rb", buffering=0) as file:
        return read(file)


def size_of(path: Place) -> int:
    """Return the size of a file in bytes.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    return path.size() if isinstance(path, Remote) else path.stat().st_size


def is_missing(path: Place) -> bool:
    """Return True if the file does not exist; False after an error of the disk or the store."""
    try:
        size_of(path)
    except FileNotFoundError:
        return True
    except (OSError, OrchestratorError):
        return False
    return False


def remove_tree(path: Place) -> None:
    """Remove a directory and its content, if it exists."""
    if isinstance(path, Remote):
        process_cache().forget(path)
        path.remove()
    else:
        shutil.rmtree(path, ignore_errors=True)


def digest_file(path: Place) -> str:
    """Compute BLAKE2b (256 bits) of the content, read in pieces of a few MiB."""

    def digest(file: Any) -> str:
        digest = hashlib.blake2b(digest_size=32)
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
        return digest.hexdigest()

    if isinstance(path, Remote):
        return path.read_with(digest)
    with path.open("rb") as file:
        return digest(file)


def digest_json(value: Any) -> str:
    """Compute BLAKE2b (256 bits) of the canonical JSON of a value: sorted keys, no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
