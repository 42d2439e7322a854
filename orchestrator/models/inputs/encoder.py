"""Encoding of documents by a tokenizer; chats by its template, if it has one."""

from typing import Any

import numpy as np

from orchestrator.errors import InputError
from orchestrator.models.inputs.chats import Chat
from orchestrator.models.inputs.documents import Document
from orchestrator.models.inputs.image_reader import ImageReader
from orchestrator.models.inputs.image_records import ImageRecord
from orchestrator.models.inputs.rows import TokenRow

NO_TEMPLATE = "no template"


class Encoder:
    """Encoding by a transformers tokenizer.

    A template writes all special tokens of a chat, so none is added to what it writes: the tokens
    are those of `apply_chat_template`.

    Args:
        template: `on`, `off`, or None: on if the tokenizer has a chat template.
        images: Reads records with images; None: the images of records are not read.

    Raises:
        InputError: `on`, and the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, images: ImageReader | None = None
    ) -> None:
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if template == "on" and not has_template:
            where = getattr(tokenizer, "name_or_path", "") or "the model"
            raise InputError(
                f"{where}: chat_template is on, and the tokenizer has no chat template; give off, "
                "which reads messages as plain text, or add chat_template.jinja to the model"
            )
        self._tokenizer, self._images = tokenizer, images
        self.prefers_chats = template == "on"
        """True if messages are read before the text of a record."""
        self.chats_by = "text" if template == "off" else "template" if has_template else NO_TEMPLATE
        """`template`; `text` by request; `no template`: as text, since there is none."""

    @property
    def with_images(self) -> bool:
        """True if the images of records are read."""
        return self._images is not None

    def row(self, document: str | Chat | ImageRecord) -> TokenRow:
        """Encode a document by itself, with its images.

        Raises:
            InputError: As `chat`, or as `ImageReader.row`.
        """
        if isinstance(document, ImageRecord):
            assert self._images is not None
            return self._images.row(document, by_template=self.chats_by != "text")
        if isinstance(document, Chat):
            return TokenRow(self.chat(document))
        return TokenRow(self.text(document, is_start=True))

    def written(self, document: Document) -> Document:
        """The document, or the contents of a chat that is not written by a template."""
        return (
            (document.contents,)
            if isinstance(document, Chat) and self.chats_by != "template"
            else document
        )

    def text(self, text: str, *, is_start: bool) -> np.ndarray:
        """Encode a text, int32 [tokens]; default special tokens only at the start of the text."""
        encoded = self._tokenizer(
            text, add_special_tokens=is_start, return_attention_mask=False, verbose=False
        )
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def chat(self, chat: Chat) -> np.ndarray:
        """Encode a chat by the template, int32 [tokens]; an empty one has none.

        Raises:
            InputError: The template refuses the messages.
        """
        if not chat.messages:
            return np.empty(0, dtype=np.int32)
        messages = [dict(message) for message in chat.messages]
        try:
            written = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # of a template, which is a program of the model's author
            (line, *_) = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"{chat.where}: the tokenizer's chat template refuses the messages: {line[:200]}; "
                "correct the record, or give --chat-template off"
            ) from error
        return self.text(written, is_start=False)
