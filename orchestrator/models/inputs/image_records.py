"""Records with images: `images` or `image` beside a text with placeholders, or beside a chat.

    {"text": "A photo of <image>: two birds.", "images": ["birds/7.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
     ...], "images": ["birds/7.png"]}
    {"conversations": [{"from": "human", "value": "<image>\\nWhich birds?"}, ...], "image": "7.png"}

The placeholder is `<image>`, or that of the model's processor. In a content of parts each part of
type image stands for the next image, or has a path of its own in `image` or `path`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.models.inputs.chats import parse_chat
from orchestrator.models.inputs.image_files import ImageFile, image_file
from orchestrator.models.inputs.sources import CHAT_FIELDS
from orchestrator.store.places import Place

IMAGE_FIELDS = ("images", "image")
PLACEHOLDER = "<image>"
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A text, or a chat whose contents are lists of parts, and the images of its placeholders."""

    where: str
    images: tuple[ImageFile, ...]
    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def is_blank(self) -> bool:
        return not (self.text.strip() or self.messages or self.images)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the images."""
        return tuple(each.name for each in self.images)

    @property
    def contents(self) -> str:
        """The contents of a chat as plain text with placeholders, or the text."""
        if not self.messages:
            return self.text
        texts = (
            "\n".join(part.get("text", PLACEHOLDER) for part in message["content"])
            for message in self.messages
        )
        return "\n\n".join(texts)


def parse_image_record(
    where: str, record: Mapping[str, Any], field: str, directory: Place
) -> ImageRecord:
    """Parse a record of a text or a chat that may have images.

    Args:
        field: Field with the text or the messages.
        directory: Directory that paths of images are relative to.

    Raises:
        InputError: An image or a message is malformed.
    """
    value = record[field]
    name = next((each for each in IMAGE_FIELDS if record.get(each)), None)
    found = record[name] if name else []
    listed = [
        image_file(f"{where}, image {number}", each, directory)
        for number, each in enumerate(found if isinstance(found, list) else [found], start=1)
    ]
    if not isinstance(value, list) and field not in CHAT_FIELDS:
        if not isinstance(value, str):
            raise InputError(f"{where}: field {field!r} holds {type(value).__name__}, not a string")
        return ImageRecord(where, tuple(listed), text=value)
    plain = [_without_images(each) for each in value] if isinstance(value, list) else value
    chat = parse_chat(where, field, plain)
    messages, own = [], list[ImageFile]()
    for number, (message, given) in enumerate(zip(chat.messages, value, strict=True), start=1):
        parts, files = _parts(f"{where}, message {number}", given, directory)
        messages.append({"role": message["role"], "content": parts})
        own += files
    if own and listed:
        raise InputError(
            f"{where}: has images in its messages and in {name!r}; give them in one of the two"
        )
    return ImageRecord(where, tuple(own or listed), messages=tuple(messages))


def _without_images(message: Any) -> Any:
    """Copy of a message without its parts of images, as a chat of text is checked."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if not _is_image(part)]}


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _parts(where: str, message: Message, directory: Place) -> tuple[list[Message], list[ImageFile]]:
    """Parts of a content, and the images that they name themselves."""
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        texts = [text.strip("\n") for text in content.split(PLACEHOLDER)]
        parts: list[Message] = []
        for number, text in enumerate(texts):
            parts += [{"type": "image"}] * (number > 0)
            parts += [{"type": "text", "text": text}] * bool(text)
        return parts, []
    parts, files = [], list[ImageFile]()
    for part in content or ():
        if not _is_image(part):
            parts.append({"type": "text", "text": part["text"]})
            continue
        parts.append({"type": "image"})
        named = next((part[name] for name in ("image", "path") if part.get(name)), None)
        if named is not None:
            files.append(image_file(f"{where}, image {len(files) + 1}", named, directory))
    return parts, files
