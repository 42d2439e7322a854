"""Encoding of records with images by the processor of a model; no code from a directory is run."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.small_files import small_files
from orchestrator.models.inputs.image_records import PLACEHOLDER, ImageRecord
from orchestrator.models.inputs.rows import TokenRow
from orchestrator.readable import counted
from orchestrator.store.places import Place

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files of which every processor has at least one."""


class ImageReader:
    """Processor of a model of images and text, loaded at its first use.

    Args:
        image_token: Token that stands for a part of an image, by the model's config.
    """

    def __init__(self, directory: Place, image_token: int) -> None:
        self._directory, self.image_token = directory, image_token

    @cached_property
    def _processor(self) -> Any:
        """The processor.

        Raises:
            InputError: The directory has none, or it cannot be loaded.
        """
        from transformers import AutoProcessor

        local = small_files(self._directory)
        if not any((local / name).is_file() for name in PROCESSOR_FILES):
            raise InputError(
                f"{self._directory}: has no processor of images ({' or '.join(PROCESSOR_FILES)}); "
                "copy the files of the model's processor to this directory"
            )
        try:
            try:
                processor = AutoProcessor.from_pretrained(
                    local, local_files_only=True, trust_remote_code=False
                )
            except ImportError as error:
                processor = _without_videos(local, error)
        except Exception as error:  # of foreign files, and of packages that a processor lacks
            raise InputError(
                f"{self._directory}: cannot load the processor of images: {_line(error)}"
            ) from error
        if not hasattr(processor, "image_processor") or not hasattr(processor, "image_token"):
            raise InputError(
                f"{self._directory}: its processor is a {type(processor).__name__}; one of images "
                "and text with a token of images is supported"
            )
        return processor

    def row(self, record: ImageRecord, *, by_template: bool) -> TokenRow:
        """Encode a record; one without images is text.

        Args:
            by_template: Write a chat by the processor's template, if it has one.

        Raises:
            InputError: The numbers of images and placeholders differ, an image cannot be read, or
                the template or the processor refuses the record.
        """
        text, is_written = self._text(record, by_template)
        placeholders = text.count(self._processor.image_token)
        if placeholders != len(record.images):
            raise InputError(
                f"{record.where}: has {counted(placeholders, 'placeholder')} ({PLACEHOLDER}) and "
                f"{counted(len(record.images), 'image')}; each image needs one placeholder"
            )
        images = [each.read() for each in record.images]
        try:
            encoded: Mapping[str, Any] = self._processor(
                text=[text],
                images=images or None,
                add_special_tokens=not is_written,
                return_tensors="pt",
            )
        except Exception as error:  # a processor may raise anything
            raise InputError(
                f"{record.where}: the processor refuses the record: {_line(error)}"
            ) from error
        arrays = {name: tensor.numpy() for name, tensor in encoded.items()}
        ids = arrays.pop("input_ids")[0].astype(np.int32)
        arrays.pop("attention_mask", None)
        return TokenRow(ids, arrays if images else {}, len(images), self.image_token)

    def _text(self, record: ImageRecord, by_template: bool) -> tuple[str, bool]:
        """Text with the processor's placeholders; True if a template has written it."""
        is_written = bool(by_template and record.messages and self._processor.chat_template)
        if not is_written:
            return record.contents.replace(PLACEHOLDER, self._processor.image_token), False
        try:
            text = self._processor.apply_chat_template(list(record.messages), tokenize=False)
        except Exception as error:  # of a template, which is a program of the model's author
            raise InputError(
                f"{record.where}: the processor's chat template refuses the messages: "
                f"{_line(error)}; correct the record, or give --chat-template off"
            ) from error
        return str(text), True


def image_reader(directory: Place, image_token: int | None) -> ImageReader | None:
    """Reader of images for a model; None for a model of text, which has no such token."""
    return None if image_token is None else ImageReader(directory, image_token)


def _without_videos(directory: Path, refusal: ImportError) -> Any:
    """Make the processor of a directory without the part that prepares videos.

    Those of Qwen's families cannot be made by transformers without torchvision, which videos alone
    need: images and text are prepared by the same code as with it.

    Raises:
        ImportError: That given, if the directory names no processor with such a part; or another
            part lacks a package.
    """
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    contents = [read_json(directory / n) for n in PROCESSOR_FILES if (directory / n).is_file()]
    name = next((each["processor_class"] for each in contents if "processor_class" in each), "")
    native: Any = getattr(transformers, str(name), None)
    is_class = isinstance(native, type) and issubclass(native, transformers.ProcessorMixin)
    if not is_class or "video_processor" not in native.get_attributes():
        raise refusal
    files = {"local_files_only": True, "trust_remote_code": False}
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(directory, **files),
        "tokenizer": AutoTokenizer.from_pretrained(directory, **files),
        "video_processor": None,
    }
    about, _ = native.get_processor_dict(directory, local_files_only=True)
    # transformers compares the part for videos with a class that it cannot import
    unchecked = {"check_argument_for_proper_class": lambda self, name, part: None}
    return type(native.__name__, (native,), unchecked)(
        **parts, chat_template=about.get("chat_template")
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
