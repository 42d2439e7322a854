"""Writing files so that nothing half-written ever looks whole."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError

_READ_BYTES = 1 << 22


@contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside `path`; what the body wrote there becomes `path` in one step.

    If the body raises, the temporary file is removed and `path` is as it was. Two writers of the
    same path do not disturb each other: the last rename wins.

    Args:
        durable: Whether the content reaches the disk before the rename. Without it a crash of the
            machine (not of the process) can leave an empty file behind.

    Raises:
        OrchestratorError: The device has no space left, or refuses the write.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OrchestratorError(
            f"{path}: cannot be written: {error.strerror or error}; "
            "free or choose another place, then run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, durable: bool = True, indent: int | None = 1) -> None:
    """`value` as sorted JSON, atomically; equal values give equal bytes.

    Args:
        durable: As `atomic` has it.
        indent: Without it all is one line, and Python writes it ten times as fast.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest_file(path: Path) -> str:
    """BLAKE2b (256 bits) of the content, read in pieces of a few MiB."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


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
