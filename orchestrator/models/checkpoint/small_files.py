"""The files of a model beside its weights: where they lie, or copies of those in a store.

Weights are read from a store range by range; config, tokenizer and licence are small, and what
reads them (transformers) needs a directory.
"""

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from orchestrator.store.cache import process_cache
from orchestrator.store.places import Place, Remote

PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
LARGEST_BYTES = 200_000_000
"""Of a file that counts as small; a tokenizer has some tens of megabytes."""


def small_files(model: Place) -> Path:
    """A local directory with them; one of a store's stays as long as the process.

    Raises:
        OrchestratorError: The store does not answer.
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
