"""Chunks at shard boundaries, on disk until the blocks after the boundary are committed.

Chunk files make the loss of a worker or driver cheap: the worker that takes over a shard reads its
input from them. Each file contains a checksum of its content, so damage is found on reading.
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
"""Time after which a missing chunk counts as lost instead of being written."""
POLL_SECONDS = 0.02
Record = Mapping[str, np.ndarray]
"""Packed chunk: flat mapping from names to arrays."""


class MissingChunk(Exception):
    """Error for a boundary chunk that is missing or damaged; it has to be computed again."""

    def __init__(self, boundary: int, index: int) -> None:
        super().__init__(boundary, index)
        self.chunk = boundary, index


class Chunks:
    """Boundary chunks of one pass; boundary b is the input of block b."""

    def __init__(self, root: Place) -> None:
        self.root = root

    def path(self, boundary: int, index: int) -> Place:
        return self.root / f"{boundary:05d}" / f"{index:07d}.safetensors"

    def write(self, boundary: int, index: int, record: Record) -> None:
        """Store one chunk. Safe against the death of the process; damage by a machine crash is
        found on reading."""
        metadata = {"crc32": _checksum(record)}
        arrays = {name: np.ascontiguousarray(array) for name, array in record.items()}
        path = self.path(boundary, index)
        write_whole(path, lambda file: save_file(arrays, file, metadata=metadata), durable=False)

    def read(self, boundary: int, index: int) -> dict[str, np.ndarray] | None:
        """Read a chunk; None if it is missing or damaged."""
        try:
            with (
                local_copy(self.path(boundary, index)) as path,
                safe_open(path, framework="numpy") as file,
            ):
                record = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get("crc32")
        except (
            OSError,
            SafetensorError,
            TypeError,
            ValueError,
        ):  # the last two are not numpy dtypes
            return None
        return record if _checksum(record) == expected else None

    def await_written(self, boundary: int, index: int) -> dict[str, np.ndarray] | None:
        """Read a chunk that another process may be writing; waits for it up to
        `WRITING_SECONDS`."""
        until = time.monotonic() + WRITING_SECONDS
        while not self.path(boundary, index).exists() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return self.read(boundary, index)

    def present(self, boundary: int, count: int) -> set[int]:
        """Return the indices below `count` for which a boundary has a chunk file."""
        try:
            names = {path.name for path in (self.root / f"{boundary:05d}").iterdir()}
        except OSError:
            return set()
        return {index for index in range(count) if self.path(boundary, index).name in names}

    def drop(self, boundary: int, index: int | None = None) -> None:
        """Remove one chunk of a boundary, or all of them."""
        if index is None:
            remove_tree(self.root / f"{boundary:05d}")
        else:
            self.path(boundary, index).unlink(missing_ok=True)

    def clear(self) -> None:
        remove_tree(self.root)


def _checksum(record: Record) -> str:
    # Against accidents only, and every chunk is written once: a cryptographic hash takes five times
    # as long, 1 % of a calibration of SmolLM2.
    checksum = 0
    for name in sorted(record):
        array = record[name]
        about = json.dumps([name, str(array.dtype), list(array.shape)]).encode()
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        checksum = zlib.crc32(content, zlib.crc32(about, checksum))
    return f"{checksum:08x}"
