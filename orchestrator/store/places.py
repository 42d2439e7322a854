"""Places of run directories and checkpoints: on local disk or in an object store.

A local place is a `pathlib.Path`. A place in a store is a `Remote` with the same methods, as far as
they are needed, so that callers need no case distinction. Files that must be opened by a path are
provided by `files.local_copy` and `Units.file`.

An object store has neither directories nor rename. Objects appear atomically, so a unit is
committed by its manifest and a checkpoint by its config, which are written last, as on disk.
"""

import os
import re
import reprlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.store.storage_errors import is_denied, is_no_bucket, patiently

Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Schemes supported by pyarrow.fs; `file` is a local path."""
_PIECE_BYTES = 1 << 23
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Remote:
    """Place on a pyarrow file system, such as `s3://BUCKET/PREFIX`; a plain value.

    Its methods are those of `pathlib.Path` with the same names. Transient errors are retried (see
    `storage_errors`). Methods raise FileNotFoundError for missing objects.

    Raises:
        UsageError: The bucket does not exist, or access is denied.
        OrchestratorError: The store does not respond, or fails otherwise.
    """

    root: str
    """Scheme and authority: `s3://BUCKET`."""
    inner: str
    """Path without a slash at either end."""
    query: str = ""
    """Options of the file system, as `pyarrow.fs.FileSystem.from_uri` knows them."""

    def __str__(self) -> str:
        inner = f"/{self.inner}" if self.inner else ""
        return f"{self.root}{inner}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str | PurePath) -> "Remote":
        more = name.as_posix() if isinstance(name, PurePath) else name
        return Remote(self.root, f"{self.inner}/{more}".strip("/"), self.query)

    @property
    def name(self) -> str:
        return self.inner.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        return Remote(self.root, self.inner.rpartition("/")[0], self.query)

    def with_name(self, name: str) -> "Remote":
        return self.parent / name

    def expanduser(self) -> "Remote":
        return self

    def absolute(self) -> "Remote":
        return self

    def exists(self) -> bool:
        return bool(self._info().type.name != "NotFound")

    def is_dir(self) -> bool:
        """Return True if any object has this name as a prefix directory."""
        return bool(self._info().type.name == "Directory")

    def is_file(self) -> bool:
        return bool(self._info().type.name == "File")

    def size(self) -> int:
        """Size of the object in bytes."""
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(f"{self}: the object does not exist")
        return int(info.size)

    def iterdir(self) -> Iterator["Remote"]:
        """Yield the places directly under this name; empty if the name does not exist."""
        return (self / name for name in self.sizes())

    def sizes(self) -> dict[str, int | None]:
        """Names directly under this one, with sizes in bytes; None for directories.

        One request per thousand names.
        """

        def sizes(system: Any, path: str) -> dict[str, int | None]:
            from pyarrow.fs import FileSelector

            found = system.get_file_info(FileSelector(path, allow_not_found=True))
            return {each.base_name: each.size for each in found if each.base_name}

        return self._call(sizes)

    def read_bytes(self) -> bytes:
        content: bytes = self.read_with(lambda file: file.read())
        return content

    def read_with(self, read: Callable[[Any], Result]) -> Result:
        """Call `read` with the object as a binary file and return its result; it may be called
        again."""

        def open_and_read(system: Any, path: str) -> Result:
            with system.open_input_file(path) as file:
                return read(file)

        return self._call(open_and_read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """Open the object as a binary file for reading."""
        assert mode == "rb"
        return self._call(lambda system, path: system.open_input_file(path))

    def unlink(self, missing_ok: bool = False) -> None:
        def delete(system: Any, path: str) -> None:
            try:
                system.delete_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

        self._call(delete)

    def remove(self) -> None:
        """Remove all objects under this name, if any."""

        def delete(system: Any, path: str) -> None:
            try:
                system.delete_dir(path)
            except FileNotFoundError:
                return

        self._call(delete)

    def upload(self, file: Path) -> None:
        """Write the content of a local file to the object, atomically."""
        self._call(lambda system, path: _undisturbed(lambda: _send(file, system, path)))

    def download(self, file: Path) -> None:
        """Copy the object to a local file; after an error the file is unusable."""

        def copy(stream: Any) -> None:
            with file.open("wb") as sink:
                shutil.copyfileobj(stream, sink, _PIECE_BYTES)

        self.read_with(copy)

    def check(self) -> None:
        """Raise UsageError unless the bucket exists and is accessible."""

        def exists(system: Any, path: str) -> bool:
            base = _filesystem(self.root, self.query)[1]
            return bool(system.get_file_info(base or path).type.name != "NotFound")

        if not self._call(exists):
            raise UsageError(
                f"{self}: {self.root} does not exist; create the bucket, or name another"
            )

    def _info(self) -> Any:
        return self._call(lambda system, path: system.get_file_info(path))

    def _call(self, action: Callable[[Any, str], Result]) -> Result:
        def act() -> Result:
            system, base = _filesystem(self.root, self.query)
            return action(system, f"{base}/{self.inner}".rstrip("/"))

        try:
            return patiently(act)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _explained(self, error) from error
        except ValueError as error:  # errors of pyarrow about the URI
            raise UsageError(f"{self}: {_first_line(error)}") from error


Place: TypeAlias = Path | Remote


def parse_place(text: str | PurePath) -> Place:
    """Parse a place, a local path or the URI of a store, without accessing it.

    Raises:
        UsageError: The scheme is unknown, or the URI has no bucket or contains a secret.
    """
    written = str(text)
    match = _URI.match(written)
    if match is None:
        return _local(written)
    scheme = match[1].lower()
    if scheme == "file":
        return _local(written[len("file://") :])
    if scheme not in SCHEMES:
        raise UsageError(
            f"{written}: {scheme}:// is not supported; "
            f"use a local path or one of {', '.join(f'{each}://' for each in SCHEMES)}"
        )
    parts = urlsplit(written)
    if parts.password is not None or (parts.username is not None and scheme in ("s3", "gs", "gcs")):
        raise UsageError(
            f"{scheme}://: a secret in a URI would be written into logs; "
            "set the store's environment variables, such as AWS_ACCESS_KEY_ID"
        )
    names = [name for name in parts.path.split("/") if name]
    if not (parts.netloc or scheme in ("hdfs", "viewfs")) or {".", ".."} & set(names):
        raise UsageError(f"{written}: write it like {scheme}://BUCKET/PREFIX")
    return Remote(f"{scheme}://{parts.netloc}", "/".join(names), parts.query)


def check_outside(name: str, place: Place, what: str, other: Place) -> None:
    """Raise UsageError if a place, in the field `name`, is another one or lies in it.

    Args:
        what: The other place in words.
    """
    ours, theirs = _parts(place), _parts(other)
    if ours[: len(theirs)] == theirs:
        is_in = "is" if ours == theirs else "lies in"
        raise UsageError(f"{name}: {place} {is_in} {what} {other}; give a place outside of it")


def check_creatable(place: Place) -> None:
    """Raise UsageError if a file or a link without a target is where a directory is to be."""
    if isinstance(place, Remote):
        return
    for each in (place, *place.parents):
        if each.is_dir():
            return
        if each.is_symlink() and not each.exists():
            raise UsageError(f"{place}: {each} is a link without a target; give a new directory")
        if each.exists():
            raise UsageError(f"{place}: {each} is a file; give a new directory")


def _parts(place: Place) -> tuple[str, ...]:
    """Parts of the real path, without links; of a place in a store, scheme and bucket first."""
    if isinstance(place, Remote):
        return (place.root, *PurePosixPath(place.inner).parts)
    return Path(os.path.realpath(place)).parts


def _local(path: str) -> Path:
    """Parse a local path; raises UsageError if no file system allows the name."""
    if "\0" in path or any(len(os.fsencode(each)) > 255 for each in path.split("/")):
        raise UsageError(
            f"{reprlib.repr(path)}: a file name has at most 255 bytes, and no zero byte"
        )
    # `~` of a user who does not exist is kept, where pathlib would raise
    return Path(os.path.expanduser(path))


@lru_cache
def _filesystem(root: str, query: str) -> tuple[Any, str]:
    """Return the file system and the prefix of its paths; finding a region takes a request."""
    # the import takes a third of a second, which a run on local disk does not need
    from pyarrow.fs import FileSystem

    if root.startswith("s3:") and "allow_delayed_open" not in query:
        # a small object in one request instead of three
        query = f"{query}&allow_delayed_open=true".lstrip("&")
    system, base = FileSystem.from_uri(f"{root}?{query}" if query else root)
    return system, base.rstrip("/")


def _send(file: Path, system: Any, path: str) -> None:
    """Copy a file to an object by a stream: `copy_files` of pyarrow 26 hides errors.

    A stream completes its object when it is closed, at the latest by its destructor, unless a write
    has failed: a partial object would then look complete.
    """
    sent, size = 0, file.stat().st_size
    with file.open("rb") as source:
        stream = system.open_output_stream(path)
        try:
            while piece := source.read(_PIECE_BYTES):
                stream.write(piece)
                sent += len(piece)
        finally:
            stream.close()
            if sent < size:
                system.delete_file(path)
    if sent < size:
        raise OSError(f"{file}: {sent} of {size} bytes could be read")


def _undisturbed(action: Callable[[], None]) -> None:
    """Perform an action in a separate thread, since interrupts reach the main thread only."""
    errors: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, name="upload", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _explained(place: Remote, error: OSError) -> OrchestratorError:
    said = _first_line(error)
    if is_no_bucket(error):
        return UsageError(
            f"{place}: {place.root} does not exist; create the bucket, or name another"
        )
    if is_denied(error):
        return UsageError(
            f"{place}: the store denies access: {said}; "
            "check the credentials in the environment of driver and workers, and their permissions"
        )
    return OrchestratorError(
        f"{place}: the store failed repeatedly: {said}; committed units are kept, "
        "run the same command again when it responds"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
