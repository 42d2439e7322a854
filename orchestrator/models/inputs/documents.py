"""Reading of documents from a text source, with specific errors for invalid input.

A source is a file (.txt, .raw, .jsonl, .parquet), a directory of such files at any depth, read in
path order, or `datasets:NAME[:CONFIG[:SPLIT]]`. A .txt or .raw file is one document; in the other
formats each record holds one document in a named field.
"""

import codecs
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import InputError, UsageError
from orchestrator.store.files import parse_json

DATASETS_PREFIX = "datasets:"
PLAIN = (".txt", ".raw")  # WikiText comes as .raw
SUFFIXES = (*PLAIN, ".jsonl", ".parquet")
READ_BYTES = 2**20

Document = Iterable[str]
"""A document as fragments of text, so that a huge one is read only as far as needed."""


def read_documents(source: str, field: str) -> Iterator[Document]:
    """Yield the documents of a source in order, each read on demand.

    Text is UTF-8. An incomplete character at the very end of a plain file, left by truncation to a
    size, is ignored; any other byte that is not UTF-8 is an error.

    Raises:
        UsageError: The source is of no known kind, or `datasets` is not installed.
        InputError: The source does not exist, has no text, cannot be decoded or lacks the field.
    """
    if source.startswith(DATASETS_PREFIX):
        yield from _from_datasets(source, field)
        return
    if "://" in source:
        raise UsageError(
            f"{source}: is a URL; texts are read from disk, so download it and give its path"
        )
    try:
        files = _files(Path(source).expanduser())
    except (OSError, RuntimeError) as error:  # name too long, or `~` of an unknown user
        raise InputError(f"{reprlib.repr(source)}: no such text: {error}") from error
    for path in files:
        suffix = path.suffix.lower()
        if suffix in PLAIN:
            yield _decoded(path)
        elif suffix == ".jsonl":
            yield from _from_jsonl(path, field)
        else:
            yield from _from_parquet(path, field)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _files(path: Path) -> list[Path]:
    allowed = ", ".join(SUFFIXES)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise InputError(f"{path}: no text files in this directory; supported are {allowed}")
        return found
    if not path.exists():
        raise InputError(f"{path}: no such text file or directory")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: text files end in {allowed}; "
            f"or name a data set as {DATASETS_PREFIX}NAME[:CONFIG[:SPLIT]]"
        )
    return [path]


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _opened(path) as file:
        while data := file.read(READ_BYTES):
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data)
            except UnicodeDecodeError as error:
                raise InputError(_undecodable(path, offset - pending, error)) from error
            offset += len(data)


def _from_jsonl(path: Path, field: str) -> Iterator[Document]:
    offset = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
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
            _check_field(where, field, record)
            yield (_text(where, field, record[field]),)


def _from_parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_field(str(path), field, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield (_text(f"{path}, row {number}", field, value),)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        (line, *_) = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path}: not a readable parquet file: {line[:200]}") from error


def _from_datasets(source: str, field: str) -> Iterator[Document]:
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
    _check_field(source, field, rows.column_names)
    for number, row in enumerate(rows.select_columns([field]), start=1):
        yield (_text(f"{source}, row {number}", field, row[field]),)


def _check_field(where: str, field: str, found: Iterable[str]) -> None:
    if field not in found:
        names = ", ".join(sorted(found)) or "none"
        raise InputError(f"{where}: no field {field!r}; fields found: {names}; name one of them")


def _text(where: str, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field!r} holds {type(value).__name__}, not a string")
    return value


def _undecodable(path: Path, start: int, error: UnicodeDecodeError) -> str:
    return (
        f"{path}: byte {error.object[error.start]:#04x} at offset {start + error.start} "
        f"is not UTF-8 ({error.reason}); convert the file to UTF-8"
    )
