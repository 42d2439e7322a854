"""Location of a model's files: a directory, a store, or a snapshot in the local hub cache."""

import re
import reprlib
from pathlib import Path

from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.other_formats import check_format
from orchestrator.store.places import Place, parse_place

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""Files that a snapshot downloads; weights in other formats and demo files are left out."""


def locate(model: str, *, revision: str | None = None, download: bool = False) -> Place:
    """Find the directory of a model named by a directory, a store URI or a hub id.

    An existing directory takes precedence over a hub id. The hub is contacted only if `download`.

    Raises:
        UsageError: A revision is given for a directory or URI; the store is unknown or denies
            access.
        InputError: No such directory or snapshot exists, or the download failed.
    """
    if "://" in model:
        place = parse_place(model)
        if revision is not None:
            raise UsageError(
                f"{model} is not a hub id; revision {revision!r} applies to hub ids only"
            )
        if not place.is_dir():
            raise InputError(f"{model}: no files found; give the prefix of a checkpoint")
        return place
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # name too long, or `~` of an unknown user
        raise InputError(
            f"{reprlib.repr(model)}: no such directory: {_first_line(error)}"
        ) from error
    if is_directory:
        if revision is not None:
            raise UsageError(
                f"{model} is a directory; revision {revision!r} applies to hub ids only"
            )
        return path
    if exists:
        check_format(path)
        raise InputError(f"{model} is a file; a directory with config and safetensors is needed")
    if not HUB_ID.fullmatch(model):
        # a message is one line, whatever the name contains
        name = model if model.isprintable() else reprlib.repr(model)
        raise InputError(f"{name}: no such directory")
    return _snapshot(model, revision, download)


def _snapshot(hub_id: str, revision: str | None, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = hub_id if revision is None else f"{hub_id} at revision {revision}"
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_files_only=not download,
                allow_patterns=list(MODEL_FILES),
            )
        )
    except LocalEntryNotFoundError as error:
        remedy = "the hub does not respond" if download else "--download fetches a hub id"
        raise InputError(
            f"{where}: neither a directory nor in the local hub cache; {remedy}"
        ) from error
    except Exception as error:  # download errors have no common base class
        raise InputError(f"{where}: cannot be downloaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
