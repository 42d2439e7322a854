"""Sources of text: one, or a mixture with weights, as written in a recipe.

    notes.txt
    a.jsonl:0.7,b.txt:0.3
    s3://BUCKET/chats.parquet:2,datasets:NAME:CONFIG:1,bundled:1

Weights are shares of the tokens, of any sum. A source whose name contains a colon or a comma is
read as it is if a file or directory of this name exists.
"""

import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import InputError, UsageError
from orchestrator.store.places import Place, parse_place

BUNDLED = "bundled"
"""Name of the text that is part of this package; see `bundled`."""
DATASETS_PREFIX = "datasets:"
PLAIN = (".txt", ".raw")  # WikiText comes as .raw
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")
CHAT_FIELDS = ("messages", "conversations")
"""Fields of records that hold a chat; the second is that of ShareGPT."""
_WEIGHTED = re.compile(r"(.+?):([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:,|$)")
CHOICES = (
    "a .txt, .jsonl or .parquet file, a directory of them, datasets:NAME, a mixture like "
    "a.jsonl:0.7,b.txt:0.3, or `bundled`, a small text that comes with this program"
)
"""Allowed sources, for messages."""


@dataclass(frozen=True, slots=True)
class TextSource:
    """A source of text and its share of the tokens; shares of a mixture sum to 1."""

    name: str
    weight: float = 1.0


def parse_sources(written: str) -> tuple[TextSource, ...]:
    """Parse a source or a mixture; only the existence of a file of the whole name is looked up.

    Raises:
        UsageError: A weight is 0, or a source occurs twice.
    """
    found = [] if _exists(written) else _WEIGHTED.findall(written)
    if (
        len(found) < 2
        or "".join(f"{name}:{weight}," for name, weight in found) != f"{written.rstrip(',')},"
    ):
        return (TextSource(written),)
    total = sum(float(weight) for _, weight in found)
    names = [name for name, _ in found]
    for name, weight in found:
        if not float(weight) > 0:
            raise UsageError(f"{name} has weight {weight}; a weight is above 0, 0.3 for example")
        if names.count(name) > 1:
            raise UsageError(f"{name} occurs twice in {written}; give it once, with one weight")
    return tuple(TextSource(name, float(weight) / total) for name, weight in found)


def named_source(written: str | None) -> str:
    """Return the calibration text of a recipe.

    Raises:
        UsageError: None is given.
    """
    if written is None:
        raise UsageError(f"calibration: no text is named; give --calibration {CHOICES}")
    return written


def place_of(source: str) -> Place:
    """Parse the place of a source.

    Raises:
        UsageError: As `parse_place`.
        InputError: No file system allows the name.
    """
    if source.startswith(("http://", "https://", "ftp://")):
        raise UsageError(f"{source}: is a URL; download it and give the path of the file")
    if "://" in source:
        return parse_place(source)
    try:
        return Path(source).expanduser()
    except (OSError, RuntimeError) as error:  # `~` of an unknown user
        raise InputError(f"{reprlib.repr(source)}: no such text: {error}") from error


def check_place(place: Place, source: str) -> bool:
    """Return True for a directory, False for a file of a known kind.

    Raises:
        UsageError: The file is of no known kind.
        InputError: It does not exist.
    """
    allowed = ", ".join(SUFFIXES)
    try:
        if place.is_dir():
            return True
        exists = place.exists()
    except OSError as error:  # name too long
        raise InputError(f"{reprlib.repr(source)}: no such text: {error}") from error
    if not exists:
        mixed = "; a mixture is written a.jsonl:0.7,b.txt:0.3" if "," in source else ""
        raise InputError(f"{place}: no such text file or directory{mixed}")
    if suffix_of(place) not in SUFFIXES:
        raise UsageError(
            f"{place}: text files end in {allowed}; "
            f"or name a data set as {DATASETS_PREFIX}NAME[:CONFIG[:SPLIT]]"
        )
    return False


def suffix_of(place: Place) -> str:
    """Suffix of a place in lower case, `.jsonl`."""
    return os.path.splitext(place.name)[1].lower()


def _exists(written: str) -> bool:
    try:
        return Path(written).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
