"""Removal of the files of a run directory that this program writes, by name.

A user may have put other files there, such as a finished checkpoint: these are left.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from orchestrator.errors import OrchestratorError
from orchestrator.store.files import remove_tree
from orchestrator.store.places import Place, Remote

Names: TypeAlias = "dict[str, Names | None]"
"""Patterns of the names in a directory; those of directories end with a slash. None: the file, or
the directory with its whole content."""

_TEMPORARY = r"\.probe-[^/]*|\..+\.[0-9a-f]{12}\.tmp"
"""Probe files, and files that are renamed when they are complete; in any directory."""
_OWN: Names = {
    r"(run|status|outputs)\.json|events\.jsonl|hold\.json(-[0-9a-f]{32})?|report\.html": None,
    r"events/": {r"\d{8}-[0-9a-f]{8}\.jsonl": None},
    r"failures/": {r"\d{4,}\.json": None},
    r"units/": {r"[0-9a-f]{2}/": {r"[0-9a-f]{64}/": None}},
    r"chunks/": {r"[0-9a-f]{16}/": None},
}


@dataclass(frozen=True, slots=True)
class Cleaning:
    """Content of a run directory, by who wrote it; directories stand for all that is in them."""

    removed: tuple[Place, ...]
    """Files and directories that this program wrote; the directory itself if it has no others."""
    left: tuple[Place, ...]
    """All others."""


def sort_content(root: Place) -> Cleaning:
    """Separate the files of a run in its directory from those of others."""
    own, others = _sorted(root, _OWN)
    return Cleaning(removed=tuple(own if others else [*own, root]), left=tuple(others))


def remove_content(root: Place, *, last: Place) -> Cleaning:
    """Remove the files of a run from its directory, and the directory once it is empty.

    Args:
        last: File by which a run directory is recognised: an interrupted removal can be repeated.

    Raises:
        OrchestratorError: A file cannot be removed.
    """
    found = sort_content(root)
    if isinstance(root, Remote) and not found.left:
        remove_tree(root)
        return found
    for place in sorted(found.removed, key=lambda place: place == last):
        if place != root:
            _remove(place)
    if isinstance(root, Path) and not found.left:
        with suppress(OSError):
            root.rmdir()
    still, _ = _sorted(root, _OWN)
    if still or (not found.left and root.exists()):
        raise OrchestratorError(f"{[*still, root][0]}: cannot be removed; check its permissions")
    return found


def _sorted(directory: Place, names: Names) -> tuple[list[Place], list[Place]]:
    """Entries that have these names, and all others."""
    own: list[Place] = []
    others: list[Place] = []
    for place, kinds in _entries(directory):
        known: Names = {_TEMPORARY: None, **names}
        fits = [each for each in known if any(re.fullmatch(each, kind) for kind in kinds)]
        below = known[fits[0]] if fits else None
        if not fits:
            others.append(place)
        elif below is None or len(kinds) > 1:
            own.append(place)
        else:
            inner, foreign = _sorted(place, below)
            own += inner if foreign else [place]
            others += foreign
    return own, others


def _entries(directory: Place) -> Iterator[tuple[Place, list[str]]]:
    """Entries in order, each with its name, with a slash for a directory; a link may be either."""
    if isinstance(directory, Remote):
        for name, size in sorted(directory.sizes().items()):
            yield directory / name, [f"{name}/" if size is None else name]
        return
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_symlink():
            yield path, [path.name, f"{path.name}/"]
        else:
            yield path, [f"{path.name}/" if path.is_dir() else path.name]


def _remove(place: Place) -> None:
    """Remove a file or a directory; of a link, only the link."""
    if isinstance(place, Remote) and place.is_file():
        place.unlink(missing_ok=True)
    elif isinstance(place, Remote) or (place.is_dir() and not place.is_symlink()):
        remove_tree(place)
    else:
        with suppress(OSError):
            place.unlink(missing_ok=True)
