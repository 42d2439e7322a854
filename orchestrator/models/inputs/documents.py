"""Reading of documents from a text source, with specific errors for invalid input.

A source is a file (.txt, .raw, .jsonl, .parquet), a directory of such files at any depth, read in
path order, the same in an object store, `datasets:NAME[:CONFIG[:SPLIT]]`, or `bundled`. A .txt or
.raw file is one document; in the other formats each record holds one document: a text in a named
field, or a chat (`chats`), with images if they are asked for (`image_records`).
"""

import codecs
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from orchestrator.errors import InputError, UsageError
from orchestrator.models.inputs.chats import Chat, parse_chat
from orchestrator.models.inputs.image_records import IMAGE_FIELDS, ImageRecord, parse_image_record
from orchestrator.models.inputs.sources import (
    BUNDLED,
    CHAT_FIELDS,
    DATASETS_PREFIX,
    PLAIN,
    SUFFIXES,
    check_place,
    place_of,
    suffix_of,
)
from orchestrator.store.files import parse_json
from orchestrator.store.places import Place, Remote

READ_BYTES = 2**20
BUNDLED_TEXT = Path(__file__).with_name("bundled.jsonl")

Document: TypeAlias = Iterable[str] | Chat | ImageRecord
"""A document: fragments of text, so that a huge one is read only as far as needed; or a chat, or a
record that may have images."""


def read_documents(
    source: str, field: str, *, prefers_chats: bool = False, with_images: bool = False
) -> Iterator[Document]:
    """Yield the documents of a source in order, each read on demand.

    Text is UTF-8. An incomplete character at the very end of a plain file, left by truncation to a
    size, is ignored, and so is a byte order mark at its begin; any other byte that is not UTF-8 is
    an error.

    Args:
        field: Field of a record that contains the text, or the messages of a chat. Of records
            without it the messages are read.
        prefers_chats: Read the messages of a record that has both.
        with_images: Read the images of records in .jsonl and .parquet too; every record is then an
            `ImageRecord`.

    Raises:
        UsageError: The source is of no known kind, or `datasets` is not installed.
        InputError: The source does not exist, has no text, cannot be decoded or lacks the field.
    """
    if source.startswith(DATASETS_PREFIX):
        yield from _from_datasets(source, field, prefers_chats)
        return
    for path in [BUNDLED_TEXT] if source == BUNDLED else _files(source):
        suffix = suffix_of(path)
        if suffix in PLAIN:
            yield _decoded(path)
        elif suffix == ".jsonl":
            records = _from_jsonl(path, field, prefers_chats)
        else:
            records = _from_parquet(path, field, prefers_chats, with_images)
        if suffix not in PLAIN:
            for where, record, found in records:
                yield (
                    parse_image_record(where, record, found, path.parent)
                    if with_images
                    else _document(where, record, found)
                )


@contextmanager
def _opened(path: Place) -> Iterator[BinaryIO]:
    try:
        if isinstance(path, Remote):
            with path.open() as stream, io.BufferedReader(stream, READ_BYTES) as buffered:
                yield buffered
        else:
            with path.open("rb") as file:
                yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _files(source: str) -> list[Place]:
    place = place_of(source)
    if not check_place(place, source):
        return [place]
    below: Iterable[Any] = (
        _below(place)
        if isinstance(place, Remote)
        else (path for path in place.rglob("*") if path.is_file())
    )
    found = sorted((path for path in below if suffix_of(path) in SUFFIXES), key=_order)
    if not found:
        raise InputError(
            f"{place}: no text files in this directory; supported are {', '.join(SUFFIXES)}"
        )
    return found


def _order(path: Place) -> Any:
    return path.inner.split("/") if isinstance(path, Remote) else path


def _below(place: Remote) -> Iterator[Remote]:
    """Yield the objects below a prefix, at any depth."""
    for name, size in place.sizes().items():
        if size is None:
            yield from _below(place / name)
        else:
            yield place / name


def _decoded(path: Place) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _opened(path) as file:
        while data := file.read(READ_BYTES):
            if offset == 0 and data.startswith(codecs.BOM_UTF8):
                data, offset = data.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data)
            except UnicodeDecodeError as error:
                raise InputError(_undecodable(path, offset - pending, error)) from error
            offset += len(data)


Records: TypeAlias = Iterator[tuple[str, Mapping[str, Any], str]]
"""Places of records, for messages, the records, and the fields of their documents."""


def _from_jsonl(path: Place, field: str, prefers_chats: bool) -> Records:
    offset = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, offset = line.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(_undecodable(path, offset, error)) from error
            offset += len(line)
            if not text.strip():
                continue
            try:
                record = parse_json(text)
            except ValueError as error:
                raise InputError(f"{where}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise InputError(
                    f"{where}: found {type(record).__name__}; a record is a JSON object"
                )
            yield where, record, _field(where, field, [*record], prefers_chats)


def _from_parquet(path: Place, field: str, prefers_chats: bool, with_images: bool) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        with _random_access(path) as content, parquet.ParquetFile(content) as file:
            names = file.schema_arrow.names
            found = _field(str(path), field, names, prefers_chats)
            images = [name for name in IMAGE_FIELDS if name in names] if with_images else []
            number, rows = 0, 16 if images else 1024
            for batch in file.iter_batches(batch_size=rows, columns=[found, *images]):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record, found
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        (line, *_) = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path}: not a readable parquet file: {line[:200]}") from error


@contextmanager
def _random_access(path: Place) -> Iterator[Any]:
    """Yield what parquet reads by ranges."""
    if isinstance(path, Remote):
        with path.open() as stream:
            yield stream
    else:
        yield path


def _from_datasets(source: str, field: str, prefers_chats: bool) -> Iterator[Document]:
    """Yield rows of a data set, from the cache of `datasets` or, unless offline, from the hub."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{source} needs the package datasets: pip install 'orchestrator[datasets]'"
        ) from error
    name, config, split, *surplus = (*source.removeprefix(DATASETS_PREFIX).split(":"), "", "")
    if not name or any(surplus):
        raise UsageError(f"{source}: write it as {DATASETS_PREFIX}NAME[:CONFIG[:SPLIT]]")
    datasets.disable_progress_bars()  # their carriage returns make one long line in logs
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: cannot load the data set: {error}") from error
    found = _field(source, field, rows.column_names, prefers_chats)
    for number, row in enumerate(rows.select_columns([found]), start=1):
        yield _document(f"{source}, row {number}", row, found)


def _field(where: str, field: str, found: Sequence[str], prefers_chats: bool) -> str:
    """Return the field to read of a record: the named one, or that of its messages."""
    chat = next((name for name in CHAT_FIELDS if name in found), None)
    if chat is not None and (prefers_chats or field not in found):
        return chat
    if field not in found:
        names = ", ".join(sorted(found)) or "none"
        raise InputError(f"{where}: no field {field!r}; fields found: {names}; name one of them")
    return field


def _document(where: str, record: Mapping[str, Any], field: str) -> Document:
    value = record[field]
    if isinstance(value, list) or field in CHAT_FIELDS:
        return parse_chat(where, field, value)
    if isinstance(value, str):
        return (value,)
    raise InputError(f"{where}: field {field!r} holds {type(value).__name__}, not a string")


def _undecodable(path: Place, start: int, error: UnicodeDecodeError) -> str:
    return (
        f"{path}: byte {error.object[error.start]:#04x} at offset {start + error.start} "
        f"is not UTF-8 ({error.reason}); convert the file to UTF-8"
    )
