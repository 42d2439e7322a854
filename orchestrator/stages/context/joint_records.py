"""Records that carry the chunks of several models."""

from collections.abc import Iterable, Mapping

import numpy as np

from orchestrator.device.transport import Departure
from orchestrator.models.shards.chunk import Chunk
from orchestrator.store.chunks import Record

SEPARATOR = ":"
"""Between a model's name and an array's name."""


def join(chunks: Mapping[str, Chunk], departure: Departure) -> dict[str, np.ndarray]:
    """Pack a chunk of each model into one record; complete after `departure.wait`."""
    return {
        f"{name}{SEPARATOR}{key}": array
        for name, chunk in chunks.items()
        for key, array in chunk.pack(departure).items()
    }


def split(record: Record, names: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return the record of each of these models."""
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for name, array in record.items():
        model, _, key = name.partition(SEPARATOR)
        parts[model][key] = array
    return parts
