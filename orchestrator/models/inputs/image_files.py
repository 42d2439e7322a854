"""Images of records: files below the directory of their text, or bytes in it."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.store.places import Place, Remote

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 2**26
"""Pixels of an image, at most: 0.2 GB once they are decoded."""
MOST_BYTES = 2**28
"""Size of an image file, at most."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that Pillow decodes itself; others start programs."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image of a record, not yet read."""

    where: str
    """The record and its image, for messages."""
    name: str
    """Path as it is written in the record; empty for bytes without a name."""
    directory: Place | None
    """Directory that the path is relative to, and must not leave; None for bytes."""
    content: bytes | None = None

    def read(self) -> "Image":
        """Decode the image to RGB, upright by its EXIF orientation.

        Raises:
            InputError: It does not exist, lies outside of the directory, is too large, is of
                another format, or is damaged.
            UsageError: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageOps, UnidentifiedImageError
        except ImportError as error:
            raise UsageError(
                f"{self.where}: images need Pillow: pip install 'orchestrator[vision]'"
            ) from error
        content = self._bytes() if self.content is None else self.content
        try:
            with warnings.catch_warnings():
                # of the number of pixels, which is checked here; others are no errors either
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            if width * height <= MOST_PIXELS:
                return ImageOps.exif_transpose(image).convert("RGB")
        except UnidentifiedImageError as error:
            raise InputError(f"{self}: is no image of the formats {', '.join(FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise InputError(f"{self}: {_line(error)}; scale it down") from error
        except Exception as error:  # of a damaged file, a decoder may raise anything
            raise InputError(f"{self}: cannot be decoded: {_line(error)}") from error
        raise InputError(
            f"{self}: {width} x {height} pixels are above the limit of {MOST_PIXELS:,}; "
            "scale it down"
        )

    def __str__(self) -> str:
        return f"{self.where} {self.name!r}" if self.name else self.where

    def _bytes(self) -> bytes:
        assert self.directory is not None
        path = self._path(self.directory)
        try:
            size = path.size() if isinstance(path, Remote) else path.stat().st_size
            if size > MOST_BYTES:
                raise InputError(f"{self}: has {size} bytes; at most {MOST_BYTES} are read")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{self}: no such file in {self.directory}") from error
        except OSError as error:
            raise InputError(f"{self}: cannot be read: {error.strerror or error}") from error
        except InputError:
            raise
        except OrchestratorError as error:  # of a store
            raise InputError(f"{self}: cannot be read: {error}") from error

    def _path(self, directory: Place) -> Place:
        """Path of the file.

        Links are followed only within the directory, or in the hub's cache to the blobs beside its
        snapshots, so that a text cannot make us read other files of this machine.

        Raises:
            InputError: It is a URL, or lies outside of the directory.
        """
        if "://" in self.name:
            raise InputError(
                f"{self}: is a URL; download the image and give its path below {directory}"
            )
        outside = InputError(
            f"{self}: lies outside of {directory}; give paths of images below the file of the text"
        )
        if isinstance(directory, Remote):
            if self.name.startswith("/") or ".." in self.name.split("/"):
                raise outside
            return directory / self.name
        try:
            path, home = (directory / self.name).resolve(), directory.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
            raise InputError(f"{self}: cannot be read: {_line(error)}") from error
        if not path.is_relative_to(_home(home)):
            raise outside
        return path


def _home(directory: Path) -> Path:
    """Directory in which links of a file may end."""
    for each in directory.parents:
        if each.name == "snapshots" and (each.parent / "blobs").is_dir():
            return each.parent
    return directory


def image_file(where: str, value: Any, directory: Place) -> ImageFile:
    """Parse an image of a record: a path, bytes, or `{"bytes": ..., "path": ...}`.

    Raises:
        InputError: It is of another type, or has neither bytes nor a path.
    """
    content, name = (
        (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    )
    if isinstance(value, bytes):
        content, name = value, ""
    if isinstance(content, bytes):
        return ImageFile(where, name if isinstance(name, str) else "", None, content)
    if not isinstance(name, str) or not name:
        found = type(value).__name__ if not isinstance(value, dict) else "neither bytes nor a path"
        raise InputError(
            f"{where}: found {found}; an image is a path below the directory of the text, or "
            '{"bytes": ..., "path": ...}'
        )
    return ImageFile(where, name, directory)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
