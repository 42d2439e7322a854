"""Places: where a run directory or a checkpoint lies, on local disk or in an object store.

A local place is a `pathlib.Path`, and nothing stands between it and the disk. A place in a store is
a `Remote`, which answers to the same names as far as places need them, so that who is given a place
need not ask which it is. What must be opened by a path is asked of `files.local_copy` and of
`Units.file`.

An object store knows no directories and no rename. An object appears whole or not at all, so a
unit is committed by its manifest and a checkpoint by its config, which come last, as on disk.
"""

import os
import re
import reprlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.store.storage_errors import is_denied, is_no_bucket, patiently

Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Of what pyarrow.fs can reach; `file` is a local path."""
_PIECE_BYTES = 1 << 23
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, slots=True)
class Remote:
    """A place on a file system of pyarrow's: `s3://BUCKET/PREFIX`; a plain value.

    Its methods are those of `pathlib.Path` with the same names. What fails for a reason that may
    pass is repeated (see `retries`). They raise FileNotFoundError where nothing is there, and

    Raises:
        UsageError: There is no such bucket, or its door stays shut.
        OrchestratorError: The store does not answer, or answers with something else.
    """

    root: str
    """Scheme and authority: `s3://BUCKET`."""
    inner: str
    """What follows, without a slash at either end."""
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
        """Whether anything lies under this name."""
        return bool(self._info().type.name == "Directory")

    def is_file(self) -> bool:
        return bool(self._info().type.name == "File")

    def size(self) -> int:
        """Bytes of the object."""
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(f"{self}: there is no such object")
        return int(info.size)

    def iterdir(self) -> Iterator["Remote"]:
        """What lies right under this name; nothing if there is no such name."""
        return (self / name for name in self.sizes())

    def sizes(self) -> dict[str, int | None]:
        """Names of what lies right under this one, with bytes; those of directories have none.

        One request for each thousand of them.
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
        """What a function makes of the object as a binary file; it may be called again."""

        def open_and_read(system: Any, path: str) -> Result:
            with system.open_input_file(path) as file:
                return read(file)

        return self._call(open_and_read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """The object as a binary file to read from."""
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
        """Removes everything under this name, if there is something."""

        def delete(system: Any, path: str) -> None:
            try:
                system.delete_dir(path)
            except FileNotFoundError:
                return

        self._call(delete)

    def upload(self, file: Path) -> None:
        """Writes the object: the content of a local file. It appears whole, or not at all."""
        self._call(lambda system, path: _undisturbed(lambda: _send(file, system, path)))

    def download(self, file: Path) -> None:
        """Copies the object into a local file; what an error leaves of that is not to be used."""

        def copy(stream: Any) -> None:
            with file.open("wb") as sink:
                shutil.copyfileobj(stream, sink, _PIECE_BYTES)

        self.read_with(copy)

    def check(self) -> None:
        """Raises UsageError unless the bucket is there and lets us look."""

        def exists(system: Any, path: str) -> bool:
            base = _filesystem(self.root, self.query)[1]
            return bool(system.get_file_info(base or path).type.name != "NotFound")

        if not self._call(exists):
            raise UsageError(f"{self}: there is no {self.root}; make the bucket, or name another")

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
        except ValueError as error:  # of pyarrow, about the URI
            raise UsageError(f"{self}: {_first_line(error)}") from error


Place: TypeAlias = Path | Remote


def parse_place(text: str | PurePath) -> Place:
    """The place that is named, a local path or the URI of a store; nothing is looked at.

    Raises:
        UsageError: The scheme is unknown, or the URI names no bucket or holds a secret.
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
            f"{written}: {scheme}:// is no place to write to; "
            f"a local path is, or one of {', '.join(f'{each}://' for each in SCHEMES)}"
        )
    parts = urlsplit(written)
    if parts.password is not None or (parts.username is not None and scheme in ("s3", "gs", "gcs")):
        raise UsageError(
            f"{scheme}://: a secret in a URI would be written into logs; "
            "give it by the store's own environment variables, AWS_ACCESS_KEY_ID and others"
        )
    names = [name for name in parts.path.split("/") if name]
    if not (parts.netloc or scheme in ("hdfs", "viewfs")) or {".", ".."} & set(names):
        raise UsageError(f"{written}: write it like {scheme}://BUCKET/PREFIX")
    return Remote(f"{scheme}://{parts.netloc}", "/".join(names), parts.query)


def _local(path: str) -> Path:
    """Raises UsageError for what no file system has a name for."""
    if "\0" in path or any(len(os.fsencode(each)) > 255 for each in path.split("/")):
        raise UsageError(
            f"{reprlib.repr(path)}: a file's name has at most 255 bytes, none of them zero"
        )
    # `~` of a user who does not exist stays as it is, where pathlib would raise
    return Path(os.path.expanduser(path))


@lru_cache
def _filesystem(root: str, query: str) -> tuple[Any, str]:
    """The file system, and what stands before a path in it; finding its region takes a request."""
    # a third of a second to import, and a run on local disk does without it
    from pyarrow.fs import FileSystem

    if root.startswith("s3:") and "allow_delayed_open" not in query:
        # a small object in one request instead of three
        query = f"{query}&allow_delayed_open=true".lstrip("&")
    system, base = FileSystem.from_uri(f"{root}?{query}" if query else root)
    return system, base.rstrip("/")


def _send(file: Path, system: Any, path: str) -> None:
    """Copies a file into an object, by a stream: `copy_files` of pyarrow 26 hides what fails.

    A stream completes its object when it is closed, by its destructor at the latest, unless a write
    has failed: what it has got by then would look whole.
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
    """Performs an action in a thread of its own: an interrupt reaches the main thread alone."""
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
        return UsageError(f"{place}: there is no {place.root}; make the bucket, or name another")
    if is_denied(error):
        return UsageError(
            f"{place}: the store does not let us in: {said}; "
            "check the credentials in the environment of driver and workers, and what they may do"
        )
    return OrchestratorError(
        f"{place}: the store failed again and again: {said}; what is committed stays, "
        "run the same command again when it answers"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
