"""Documents into token sequences, for calibration and for evaluation.

Two layouts make sequences of documents:

- `packed`: documents are joined by a blank line into one text, encoded, and cut into windows that
  do not overlap. A single .txt file is therefore encoded whole, and WikiText as rows gives exactly
  the text that perplexities are published on. Special tokens that the tokenizer adds by default
  (none for SmolLM2 and GPT-2, a leading BOS for Llama 2) are added once, at the start of the text.
  Text beyond `PIECE_CHARACTERS` is encoded in pieces of at most that length, cut after a line's
  end, so that windows at the start of a huge text need only its start.
- `padded`: one document a row, with the special tokens that the tokenizer adds by default, cut to
  the sequence length or padded on the right. The mask tells real tokens from padding. Blank
  documents are passed over.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import numpy as np

from orchestrator.errors import InputError, UsageError
from orchestrator.models.inputs.documents import Document, read_documents

PIECE_CHARACTERS = 2**21
BETWEEN_DOCUMENTS = "\n\n"
MAX_TOKENS = 2**32
"""That are read of a text; what is taken of them is held in memory."""
LAYOUTS = ("packed", "padded")
SAMPLINGS = ("first", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Sequences of one length."""

    ids: np.ndarray
    """int32 [sequences, length]."""
    mask: np.ndarray
    """bool [sequences, length]: true on real tokens, which come first in every row."""
    report: dict[str, Any]
    """Where they are from: source, documents and tokens read, sequences, tokens used (real ones),
    documents cut short by the sequence length."""

    def check_within(self, vocabulary: int, model: object) -> None:
        """Raises InputError if a token is none of a model's vocabulary."""
        highest = int(self.ids.max())
        if highest >= vocabulary:
            raise InputError(
                f"{model}: its tokenizer gives token {highest}, and its vocabulary has "
                f"{vocabulary}; the tokenizer's files must be this model's own"
            )


def load_tokens(
    source: str,
    *,
    tokenizer: Any,
    samples: int,
    sequence_length: int,
    field: str = "text",
    sampling: str = "first",
    layout: str = "packed",
    seed: int = 0,
    stride: int = 1,
) -> Tokens:
    """The sequences that a text gives.

    Reading stops where enough is read with `first`; `random` reads the whole source, `padded`
    twice. Encoding runs at about 1.5 MB a second.

    Args:
        source: A file, directory or data set, see `orchestrator.models.inputs.documents`.
        tokenizer: A transformers tokenizer.
        samples: Sequences wanted; fewer are an error, never a shorter result.
        field: Field of records that holds the text.
        sampling: `first` takes windows (documents, if padded) 0, stride, 2 stride, ...; `random`
            draws windows at random offsets (they may overlap), or distinct documents kept in
            order.
        seed: Of `numpy.random.default_rng`, used by `random` alone.
        stride: Takes each stride-th window or document; 1 with `random`.

    Raises:
        UsageError: An argument is out of range, the source is of no known kind, or `datasets` is
            not installed.
        InputError: The source does not exist, cannot be decoded, lacks the field or is too short.
    """
    _check(samples=samples, sequence_length=sequence_length, stride=stride)
    if samples * sequence_length * stride > MAX_TOKENS:
        raise UsageError(
            f"{samples} sequences of {sequence_length} tokens with stride {stride} are asked for; "
            f"{MAX_TOKENS} tokens are possible"
        )
    if layout not in LAYOUTS or sampling not in SAMPLINGS:
        raise UsageError(
            f"layout is {layout!r} and sampling {sampling!r}; "
            f"allowed are {', '.join(LAYOUTS)} and {', '.join(SAMPLINGS)}"
        )
    if sampling == "random" and stride != 1:
        raise UsageError(f"stride is {stride}; it goes with sampling first, not random")

    def documents() -> Iterator[Document]:
        return read_documents(source, field)

    rng = np.random.default_rng(seed) if sampling == "random" else None
    read: Counter[str] = Counter()
    make_rows = _packed_rows if layout == "packed" else _padded_rows
    rows = make_rows(
        documents,
        read,
        tokenizer=tokenizer,
        samples=samples,
        length=sequence_length,
        stride=stride,
        rng=rng,
    )
    if len(rows) < samples:
        raise InputError(
            f"{source}: {read['documents']} documents with {read['tokens_read']} tokens give "
            f"{len(rows)} of {samples} {layout} sequences of {sequence_length} tokens"
            f"{f' with stride {stride}' if stride > 1 else ''}; "
            "give more text, or ask for fewer or shorter sequences"
        )
    # padding is masked, so any token does that every model can embed
    ids = np.zeros((samples, sequence_length), dtype=np.int32)
    mask = np.zeros((samples, sequence_length), dtype=bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    report = {
        "source": source,
        "layout": layout,
        "sampling": sampling,
        "documents": read["documents"],
        "documents_cut": read["documents_cut"],
        "tokens_read": read["tokens_read"],
        "sequences": samples,
        "sequence_length": sequence_length,
        "tokens_used": int(mask.sum()),
    }
    return Tokens(ids=ids, mask=mask, report=report)


def _packed_rows(
    documents: Callable[[], Iterator[Document]],
    read: Counter[str],
    *,
    tokenizer: Any,
    samples: int,
    length: int,
    stride: int,
    rng: np.random.Generator | None,
) -> list[np.ndarray]:
    """Windows of the joined text, at most `samples`; counts what was read."""
    needed = ((samples - 1) * stride + 1) * length
    parts: list[np.ndarray] = []
    for piece in _pieces(_joined(documents(), read)):
        parts.append(_encode(tokenizer, piece, is_start=not parts))
        read["tokens_read"] += len(parts[-1])
        if rng is None and read["tokens_read"] >= needed:
            break
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    last = len(stream) - length
    if last < 0:
        return []
    starts = (
        np.arange(0, last + 1, stride * length)[:samples]
        if rng is None
        else rng.integers(0, last + 1, size=samples)
    )
    return [stream[start : start + length] for start in starts]


def _padded_rows(
    documents: Callable[[], Iterator[Document]],
    read: Counter[str],
    *,
    tokenizer: Any,
    samples: int,
    length: int,
    stride: int,
    rng: np.random.Generator | None,
) -> list[np.ndarray]:
    """Documents cut to the length, at most `samples`; counts what was read."""
    if rng is None:
        chosen: Iterator[str] = islice(_beginnings(documents()), 0, samples * stride, stride)
    else:
        # Counted first and read again, so that only one document is in memory at a time.
        count = sum(1 for _ in _beginnings(documents()))
        picked = np.zeros(count, dtype=bool)
        picked[rng.permutation(count)[:samples]] = True
        chosen = compress(_beginnings(documents()), picked)
    rows = []
    for text in chosen:
        row = _encode(tokenizer, text, is_start=True)
        read["documents"] += 1
        read["tokens_read"] += len(row)
        read["documents_cut"] += len(row) > length
        rows.append(row[:length])
    return rows


def _joined(documents: Iterable[Document], read: Counter[str]) -> Iterator[str]:
    """The fragments of all documents, a blank line between one document and the next."""
    for document in documents:
        if read["documents"]:
            yield BETWEEN_DOCUMENTS
        read["documents"] += 1
        yield from document


def _pieces(fragments: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that depend on the text alone, not on how it was fragmented."""
    text = ""
    for fragment in fragments:
        text += fragment
        while len(text) > PIECE_CHARACTERS:
            cut = text.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _beginnings(documents: Iterable[Document]) -> Iterator[str]:
    """Every document that is not blank, up to one piece: more than any sequence takes."""
    return filter(str.strip, (next(_pieces(document), "") for document in documents))


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; it must be 1 or above")


def _encode(tokenizer: Any, text: str, *, is_start: bool) -> np.ndarray:
    """int32 [tokens]; the tokenizer's own special tokens only at the start of a text."""
    encoded = tokenizer(
        text, add_special_tokens=is_start, return_attention_mask=False, verbose=False
    )
    return np.asarray(encoded["input_ids"], dtype=np.int32)
