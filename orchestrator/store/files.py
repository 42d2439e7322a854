"""Writing files so that nothing half-written ever looks whole; reading them patiently.

On local disk a file is written under a temporary name, brought to the disk and renamed. In an
object store it is written on this node's disk and then uploaded: the object appears whole.
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
"""Of JSON that is read: what Python's own functions then do with the value ends at some 1000."""
_READ_BYTES = 1 << 22
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")


@contextmanager
def atomic(path: Place, *, durable: bool = True) -> Iterator[Path]:
    """A temporary local name; what the body wrote there becomes `path` in one step.

    If the body raises, the temporary file is removed and `path` is as it was. Two writers of the
    same path do not disturb each other: the last one wins.

    Args:
        durable: Whether the content reaches the disk before the rename. Without it a crash of the
            machine (not of the process) can leave an empty file behind. What a store has taken is
            always durable.

    Raises:
        OrchestratorError: The device has no space left, or refuses the write; or the store.
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
            where += ", the copy on this node does not fit under TMPDIR"
        raise OrchestratorError(
            f"{where}: {refused.strerror or refused}; "
            "free or choose another place, then run the same command again"
        ) from error


@contextmanager
def _renamed(path: Path, durable: bool) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        patiently(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        yield temporary
        if durable:
            # not again after a failure: what did not reach the disk then counts as written
            _fsync(temporary)
        patiently(lambda: os.replace(temporary, path))
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _system_error(error: Exception) -> OSError | None:
    """What the system refused; safetensors tells its number in words only."""
    if isinstance(error, OSError):
        return error
    found = _RUST_ERROR.search(str(error))
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))


def write_whole(path: Place, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """`atomic` with a body that can be repeated, and is, while its error may pass.

    Raises:
        OrchestratorError: As `atomic`.
    """
    with atomic(path, durable=durable) as temporary:
        patiently(lambda: write(temporary))


def write_json(path: Place, value: Any, *, durable: bool = True, indent: int | None = 1) -> None:
    """`value` as sorted JSON, atomically; equal values give equal bytes.

    Args:
        durable: As `atomic` has it.
        indent: Without it all is one line, and Python writes it ten times as fast.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"), durable=durable)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8, that anybody may have written.

    Raises:
        ValueError: It is none, or one that cannot be written again: nested more than `MAX_NESTING`
            deep, or with half of a surrogate pair in a string.
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
    """The objects and arrays right inside objects and arrays."""
    return [
        inner
        for each in values
        for inner in (each.values() if type(each) is dict else each)
        if type(inner) in (dict, list)
    ]


def read_bytes(path: Place) -> bytes:
    """The content, tried again while the error may pass.

    Raises:
        OSError: It is not there, or the disk refuses; a store raises as `Remote` does.
    """
    return path.read_bytes() if isinstance(path, Remote) else patiently(path.read_bytes)


@contextmanager
def local_copy(path: Place) -> Iterator[Path]:
    """A local path to the same content: the file itself, or a copy for as long as the body runs.

    Raises:
        FileNotFoundError: It is in a store, and not there.
    """
    if isinstance(path, Path):
        yield path
        return
    with temporary_file(f"-{path.name}") as temporary:
        path.download(temporary)
        yield temporary


def read_with(path: Place, read: Callable[[Any], Result]) -> Result:
    """What a function makes of a file, opened to be read; of a store's it may be called again.

    Raises:
        OSError: As opening and reading do.
        OrchestratorError: The store does not answer.
    """
    if isinstance(path, Remote):
        return path.read_with(read)
    with path.open("rb", buffering=0) as file:
        return read(file)


def size_of(path: Place) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: There is none.
    """
    return path.size() if isinstance(path, Remote) else path.stat().st_size


def remove_tree(path: Place) -> None:
    """Removes a directory with all that lies in it, if it is there."""
    if isinstance(path, Remote):
        process_cache().forget(path)
        path.remove()
    else:
        shutil.rmtree(path, ignore_errors=True)


def digest_file(path: Place) -> str:
    """BLAKE2b (256 bits) of the content, read in pieces of a few MiB."""

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
    """BLAKE2b (256 bits) of a value's canonical JSON: sorted keys, no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
