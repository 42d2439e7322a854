"""Local directory of a model's files other than weights, copied if the model is in a store.

Weights are read from a store by byte range. Config, tokenizer and licence files are small, and
their reader (transformers) needs a directory.
"""

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from orchestrator.store.cache import process_cache
from orchestrator.store.places import Place, Remote

PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
LARGEST_BYTES = 200_000_000
"""Size limit of a small file; a tokenizer has some tens of megabytes."""


def small_files(model: Place) -> Path:
    """Return a local directory with the small files; copies from a store last until process exit.

    Raises:
        OrchestratorError: The store does not respond.
    """
    return model if isinstance(model, Path) else _copied(model)


@cache
def _copied(model: Remote) -> Path:
    directory = process_cache().temporary("-model")
    directory.mkdir()
    for name, size in model.sizes().items():
        is_small = size is not None and size <= LARGEST_BYTES
        if is_small and any(fnmatchcase(name, pattern) for pattern in PATTERNS):
            (model / name).download(directory / name)
    return directory
