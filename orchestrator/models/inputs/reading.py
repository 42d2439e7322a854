"""Reading of one source to tokens: a stream of its packed text, or a row for each document."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress, groupby, islice
from typing import Any

import numpy as np

from orchestrator.models.inputs.chats import Chat
from orchestrator.models.inputs.documents import Document, read_documents
from orchestrator.models.inputs.encoder import Encoder
from orchestrator.models.inputs.image_records import ImageRecord
from orchestrator.models.inputs.rows import TokenRow
from orchestrator.models.inputs.sources import TextSource

PIECE_CHARACTERS = 2**21
BETWEEN_DOCUMENTS = "\n\n"


class Reading:
    """A source that is read, with counts and a digest of what has been read.

    Args:
        field: Field of records that contains the text.
    """

    def __init__(self, source: TextSource, field: str, encoder: Encoder) -> None:
        self.source = source
        self.read: Counter[str] = Counter()
        """Documents, chats among them, documents cut to the sequence length, tokens."""
        self._field, self._encoder = field, encoder
        self._digest = hashlib.blake2b(digest_size=32)

    def has_images(self, documents: int) -> bool:
        """Test if one of the first documents has images."""
        return any(
            isinstance(each, ImageRecord) and each.images
            for each in islice(self.documents(with_images=True), documents)
        )

    def stream(self, needed: int | None) -> np.ndarray:
        """Encode the joined text, int32 [tokens], up to at least this number of tokens; None: all.

        Neighbouring texts are joined by a blank line and encoded as one text. A chat is encoded by
        itself and joined without a separator: its template ends it.
        """
        parts: list[np.ndarray] = []
        for part in self._parts():
            parts.append(part)
            self.read["tokens_read"] += len(part)
            if needed is not None and self.read["tokens_read"] >= needed:
                break
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def rows(
        self, most: int, length: int, *, stride: int, rng: np.random.Generator | None
    ) -> list[TokenRow]:
        """Encode documents, at most `most`, each truncated to `length` tokens; blank ones are
        skipped, and so are those that would lose a token of an image.

        Args:
            stride: Take every stride-th document.
            rng: Draws distinct documents, which stay in order; None: the first ones.
        """
        if rng is None:
            # some documents with images are skipped
            stop = None if self._encoder.with_images else most * stride
            chosen: Iterator[str | Chat | ImageRecord] = islice(self._beginnings(), 0, stop, stride)
        else:
            # Counted, then read again, so that only one document is in memory at a time.
            count = sum(1 for _ in self._beginnings())
            picked = np.zeros(count, dtype=bool)
            picked[rng.permutation(count)[:most]] = True
            chosen = compress(self._beginnings(), picked)
        rows: list[TokenRow] = []
        for document in chosen:
            row = self._encoder.row(document)
            cut = row.cut(length)
            self.read["documents"] += 1
            self.read["tokens_read"] += len(row)
            self.read["documents_cut"] += len(row) > length and cut is not None
            self.read["documents_skipped"] += cut is None
            rows += [] if cut is None else [cut]
            if len(rows) == most:
                break
        return rows

    def report(self) -> dict[str, Any]:
        """Name, weight, counts, and the BLAKE2b of the texts as far as they were read."""
        chats = self.read["chats"]
        return {
            "source": self.source.name,
            "weight": self.source.weight,
            "documents": self.read["documents"],
            **({"chats": chats, "chats_by": self._encoder.chats_by} if chats else {}),
            "tokens_read": self.read["tokens_read"],
            "blake2b": self._digest.hexdigest(),
        }

    def _parts(self) -> Iterator[np.ndarray]:
        """Yield the tokens of the joined text in parts."""
        for is_chat, group in groupby(self._documents(), key=lambda each: isinstance(each, Chat)):
            if not is_chat:
                for number, piece in enumerate(pieces(self._joined(group))):
                    yield self._encoder.text(piece, is_start=number == 0)
                continue
            for chat in group:
                assert isinstance(chat, Chat)  # records with images are never packed
                self.read["documents"] += 1
                yield self._encoder.chat(chat)

    def _joined(self, documents: Iterable[Document]) -> Iterator[str]:
        """Yield the fragments of texts, with a blank line between documents."""
        for number, document in enumerate(documents):
            assert not isinstance(document, Chat | ImageRecord)
            if number:
                yield BETWEEN_DOCUMENTS
            self.read["documents"] += 1
            yield from document

    def _beginnings(self) -> Iterator[str | Chat | ImageRecord]:
        """Yield every chat with messages, and the first piece of every text that is not blank:
        longer than any sequence."""
        for document in self._documents():
            if isinstance(document, ImageRecord):
                if not document.is_blank:
                    yield document
            elif isinstance(document, Chat):
                if document.messages:
                    yield document
            elif (beginning := next(pieces(document), "")).strip():
                yield beginning

    def _documents(self) -> Iterator[Document]:
        """Yield the documents from the first one; the digest is that of the last reading."""
        self._digest, self.read["chats"] = hashlib.blake2b(digest_size=32), 0
        for document in self.documents(with_images=self._encoder.with_images):
            if isinstance(document, ImageRecord):
                self.read["chats"] += bool(document.messages)
                self._digest.update(repr((document.contents, document.names)).encode())
                yield document
                self._digest.update(b"\0")
                continue
            self.read["chats"] += isinstance(document, Chat)
            written = self._encoder.written(document)
            if isinstance(written, Chat):
                self._digest.update(json.dumps(written.messages).encode())
                yield written
            else:
                assert not isinstance(written, ImageRecord)
                yield self._digested(written)
            self._digest.update(b"\0")

    def documents(self, *, with_images: bool) -> Iterator[Document]:
        """Read the documents of the source."""
        return read_documents(
            self.source.name,
            self._field,
            prefers_chats=self._encoder.prefers_chats,
            with_images=with_images,
        )

    def _digested(self, fragments: Iterable[str]) -> Iterator[str]:
        for fragment in fragments:
            self._digest.update(fragment.encode(errors="replace"))
            yield fragment


def pieces(fragments: Iterable[str]) -> Iterator[str]:
    """Yield the text in pieces that depend only on the text, not on its fragments."""
    text = ""
    for fragment in fragments:
        text += fragment
        while len(text) > PIECE_CHARACTERS:
            cut = text.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text
