"""Where a model's files are: a directory, or a snapshot in the local cache of the hub."""

import re
import reprlib
from pathlib import Path

from orchestrator.errors import InputError, UsageError
from orchestrator.store.places import Place, parse_place

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
"""What a snapshot needs; weights in other formats and demonstration files stay on the hub."""


def locate(model: str, *, revision: str | None = None, download: bool = False) -> Place:
    """The directory of a model given as a directory, the URI of one in a store, or a hub id.

    A directory of that name wins over a hub id. The hub is asked only with `download`.

    Raises:
        UsageError: A revision is given for a directory; a store is unknown or does not let us in.
        InputError: There is no such directory or snapshot, or the download failed.
    """
    if "://" in model:
        place = parse_place(model)
        if revision is not None:
            raise UsageError(f"{model} is no hub id, which revision {revision!r} goes with")
        if not place.is_dir():
            raise InputError(f"{model}: nothing lies there; give the prefix of a checkpoint")
        return place
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name longer than any, the `~` of nobody
        raise InputError(
            f"{reprlib.repr(model)}: no such directory: {_first_line(error)}"
        ) from error
    if is_directory:
        if revision is not None:
            raise UsageError(f"{model} is a directory; revision {revision!r} goes with a hub id")
        return path
    if exists:
        raise InputError(f"{model} is a file; a model is a directory with config and safetensors")
    if not HUB_ID.fullmatch(model):
        raise InputError(f"{model}: no such directory")
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
        remedy = "the hub does not answer" if download else "--download fetches a hub id"
        raise InputError(
            f"{where}: no such directory, nor in the local cache of the hub; {remedy}"
        ) from error
    except Exception as error:  # the failures of a download have no base class of their own
        raise InputError(f"{where}: cannot be downloaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
