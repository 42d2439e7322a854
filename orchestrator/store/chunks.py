"""Chunks at the boundaries between shards, on disk until the blocks behind them are committed.

A chunk's file is what makes a lost worker or driver cheap: whoever takes over a shard reads its
input here. It carries the checksum of its content, so damage is found where it is read.
"""

import json
import time
import zlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from orchestrator.store.files import local_copy, remove_tree, write_whole
from orchestrator.store.places import Place

WRITING_SECONDS = 1.0
"""A chunk that is not there after so long is not on its way to its file, but lost."""
POLL_SECONDS = 0.02
Record = Mapping[str, np.ndarray]
"""A packed chunk: a flat mapping from names to arrays."""


class MissingChunk(Exception):
    """A boundary chunk that should be there is not, or is damaged; it has to be computed again."""

    def __init__(self, boundary: int, index: int) -> None:
        super().__init__(boundary, index)
        self.chunk = boundary, index


class Chunks:
    """The boundary chunks of one pass; boundary b is the input of block b."""

    def __init__(self, root: Place) -> None:
        self.root = root

    def path(self, boundary: int, index: int) -> Place:
        return self.root / f"{boundary:05d}" / f"{index:07d}.safetensors"

    def write(self, boundary: int, index: int, record: Record) -> None:
        """Stores one chunk; a process may die at any moment, a machine's crash is found later."""
        metadata = {"crc32": _checksum(record)}
        arrays = {name: np.ascontiguousarray(array) for name, array in record.items()}
        path = self.path(boundary, index)
        write_whole(path, lambda file: save_file(arrays, file, metadata=metadata), durable=False)

    def read(self, boundary: int, index: int) -> dict[str, np.ndarray] | None:
        """The chunk, or nothing if it is not there or its content is not what was written."""
        try:
            with (
                local_copy(self.path(boundary, index)) as path,
                safe_open(path, framework="numpy") as file,
            ):
                record = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("crc32")
        except (OSError, SafetensorError, TypeError, ValueError):  # the last two: no dtype of numpy
            return None
        return record if _checksum(record) == expected else None

    def await_written(self, boundary: int, index: int) -> dict[str, np.ndarray] | None:
        """The same of a chunk that somebody may be about to write: it is waited for a little."""
        until = time.monotonic() + WRITING_SECONDS
        while not self.path(boundary, index).exists() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return self.read(boundary, index)

    def present(self, boundary: int, count: int) -> set[int]:
        """Which of the first `count` chunks of a boundary have a file."""
        try:
            names = {path.name for path in (self.root / f"{boundary:05d}").iterdir()}
        except OSError:
            return set()
        return {index for index in range(count) if self.path(boundary, index).name in names}

    def drop(self, boundary: int, index: int | None = None) -> None:
        """Removes one chunk of a boundary, or all of them."""
        if index is None:
            remove_tree(self.root / f"{boundary:05d}")
        else:
            self.path(boundary, index).unlink(missing_ok=True)

    def clear(self) -> None:
        remove_tree(self.root)


def _checksum(record: Record) -> str:
    # Against accidents, and every chunk is written once: a cryptographic hash takes five times as
    # long, 1 % of a calibration of SmolLM2.
    checksum = 0
    for name in sorted(record):
        array = record[name]
        about = json.dumps([name, str(array.dtype), list(array.shape)]).encode()
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        checksum = zlib.crc32(content, zlib.crc32(about, checksum))
    return f"{checksum:08x}"
