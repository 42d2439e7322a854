"""Token sequences from documents, for calibration and evaluation.

Two layouts:

- `packed`: documents are joined by a blank line into one text, encoded, and cut into windows that
  do not overlap. A single .txt file is therefore encoded whole, and WikiText in rows gives exactly
  the text that published perplexities use. Special tokens that the tokenizer adds by default
  (none for SmolLM2 and GPT-2, a leading BOS for Llama 2) are added once, at the start of the text.
  Text longer than `PIECE_CHARACTERS` is encoded in pieces of at most that length, cut after a line
  end, so that windows at the start of a huge text need only its start.
- `padded`: one document per row, with its images if the model reads them, with the special tokens
  that the tokenizer adds by default, truncated to the sequence length or padded on the right. The
  mask separates real tokens from padding. Blank documents are skipped, and those that would lose a
  token of an image.

A chat (`chats`) is encoded by the tokenizer's template, with the special tokens of that alone; in
packed text it stands between texts and other chats without a separator.

A mixture (`sources`) has windows or documents of each source in proportion to the weights by
tokens, interleaved so that every beginning of the sequences is mixed; each source keeps its order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.errors import InputError, UsageError
from orchestrator.models.inputs.encoder import Encoder
from orchestrator.models.inputs.image_reader import ImageReader
from orchestrator.models.inputs.mixture import Wanted, fit, interleave
from orchestrator.models.inputs.reading import Reading
from orchestrator.models.inputs.rows import TokenRow
from orchestrator.models.inputs.sources import parse_sources
from orchestrator.readable import counted

MAX_TOKENS = 2**32
"""Limit of tokens read from a text; those used are held in memory."""
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
    """Origin and counts: source, documents and tokens read, sequences, real tokens used, documents
    truncated to the sequence length; with images also their number, their tokens and those of text.
    """
    inputs: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Other inputs of the model by sequence and name, for those with images."""
    is_image: np.ndarray | None = None
    """bool [sequences, length]: true on tokens that stand for images; None if there are none."""

    def check_within(
        self, vocabulary: int, model: object, *, image_token: int | None = None
    ) -> None:
        """Raise InputError if a token is outside a model's vocabulary, or stands for an image that
        was not given.
        """
        if self.is_image is None and image_token is not None and (self.ids == image_token).any():
            raise InputError(
                f"{self.report['source']}: has the placeholder of an image (token {image_token}) "
                "without an image; give records with images, or remove it from the text"
            )
        highest = int(self.ids.max())
        if highest >= vocabulary:
            raise InputError(
                f"{model}: its tokenizer gives token {highest}, but its vocabulary has "
                f"{vocabulary}; use the tokenizer files of this model"
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
    rng: np.random.Generator | None = None,
    stride: int = 1,
    chat_template: str | None = None,
    fewer: bool = False,
    shorter: bool = False,
    images: ImageReader | None = None,
) -> Tokens:
    """Read a text source and tokenize it into sequences of one length.

    With `first`, reading stops as soon as there are enough tokens; `random` reads the whole source,
    and twice if `padded`. Encoding runs at about 1.5 MB/s.

    Args:
        source: File, directory or data set, or a mixture; see `orchestrator.models.inputs.sources`.
        tokenizer: A transformers tokenizer.
        samples: Number of sequences; a source with fewer is an error, unless `fewer`.
        field: Field of records that contains the text.
        sampling: `first` takes windows (documents, if padded) 0, stride, 2 stride, ...; `random`
            draws windows at random offsets, which may overlap, or distinct documents in order.
        rng: Generator that `random` draws with; by default one of seed 0.
        stride: Take every stride-th window or document; must be 1 with `random`.
        chat_template: `on`, `off`, or None: on if the tokenizer has a template.
        fewer: Give as many sequences as a short text has.
        shorter: With `fewer`, give shorter ones too: those that divide a short text evenly; if
            padded, those of the longest document.
        images: Reads images of records; if a source has any, all sources are padded.

    Raises:
        UsageError: An argument is out of range, the source is of no known kind, or `datasets` is
            not installed.
        InputError: The source does not exist, cannot be decoded, lacks the field or is too short;
            a chat is malformed, or the tokenizer has no template for it.
    """
    _check_counts(samples=samples, sequence_length=sequence_length, stride=stride)
    _check_sampling(layout, sampling, stride)
    counts = {"samples": samples, "length": sequence_length, "stride": stride}
    wanted = Wanted(**counts, fewer=fewer, shorter=shorter)
    encoder = Encoder(tokenizer, chat_template)
    readings = [Reading(each, field, encoder) for each in parse_sources(source)]
    if images is not None and any(each.has_images(samples * stride) for each in readings):
        layout, encoder = "padded", Encoder(tokenizer, chat_template, images)
        readings = [Reading(each.source, field, encoder) for each in readings]
    drawn = (rng or np.random.default_rng(0)) if sampling == "random" else None
    length, rows = (_packed if layout == "packed" else _padded)(readings, wanted, drawn)
    if encoder.prefers_chats and not any(each.read["chats"] for each in readings):
        raise InputError(
            f"{source}: chat_template is on, and no record has messages; give text "
            "with messages, or leave chat_template out"
        )
    origin = {"source": source, "layout": layout, "sampling": sampling}
    return _tokens(readings, rows, length, origin)


def _tokens(
    readings: Sequence[Reading], rows: "Rows", length: int, origin: Mapping[str, Any]
) -> Tokens:
    """Pad sequences to a length, and report on them."""
    ids, mask = _padded_to(length, [row.ids for _, row in rows])
    report = {**origin, **_counts(readings, rows, mask)}
    if not any(row.images for _, row in rows):
        return Tokens(ids=ids, mask=mask, report=report)
    is_image = _padded_to(length, [row.is_image for _, row in rows])[0].astype(bool)
    inputs = {i: row.padded_inputs(length) for i, (_, row) in enumerate(rows) if row.images}
    return Tokens(
        ids=ids,
        mask=mask,
        report=report | _image_counts(readings, rows, is_image),
        inputs=inputs,
        is_image=is_image,
    )


def _padded_to(length: int, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows of tokens on the right: ids int32 and mask bool, both [rows, length]."""
    # padding is masked, so any token works that every model can embed
    ids = np.zeros((len(rows), length), dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return ids, mask


Rows = list[tuple[int, TokenRow]]
"""Sequences, each with the number of its source."""


def _image_counts(readings: Sequence[Reading], rows: Rows, is_image: np.ndarray) -> dict[str, int]:
    """Counts of a token report about images."""
    image_tokens, used = int(is_image.sum()), sum(len(row) for _, row in rows)
    return {
        "images": sum(row.images for _, row in rows),
        "image_tokens": image_tokens,
        "text_tokens": used - image_tokens,
        "documents_skipped": sum(each.read["documents_skipped"] for each in readings),
    }


def _counts(readings: Sequence[Reading], rows: Rows, mask: np.ndarray) -> dict[str, Any]:
    """Counts of a token report: documents and tokens read, sequences and tokens used; of each
    source too."""
    read = {
        name: sum(each.read[name] for each in readings)
        for name in ("documents", "documents_cut", "tokens_read")
    }
    sources = []
    for number, reading in enumerate(readings):
        used = [len(row) for index, row in rows if index == number]
        sources.append({**reading.report(), "sequences": len(used), "tokens_used": sum(used)})
    return {
        **read,
        "sequences": len(rows),
        "sequence_length": mask.shape[1],
        "tokens_used": int(mask.sum()),
        "sources": sources,
    }


def _packed(
    readings: Sequence[Reading], wanted: Wanted, rng: np.random.Generator | None
) -> tuple[int, Rows]:
    """Cut windows from the joined text of each source; returns their length too."""
    weights = [each.source.weight for each in readings]
    needed = [None] * len(readings) if rng is not None else wanted.needed(weights)
    streams = [each.stream(limit) for each, limit in zip(readings, needed, strict=True)]
    length, counts = fit(wanted, [len(stream) for stream in streams], weights)
    cut = []
    for reading, stream, count in zip(readings, streams, counts, strict=True):
        there = wanted.windows(len(stream), max(length, 1))
        if rng is not None and not wanted.fewer:
            there = count * (there > 0)
        if there < max(count, 1):
            what = f"{there} of {max(count, 1)} packed sequences of {max(length, 1)} tokens"
            raise _too_short(reading, what, wanted.stride)
        starts = (
            np.arange(count) * wanted.stride * length
            if rng is None
            else rng.integers(0, len(stream) - length + 1, size=count)
        )
        cut.append([stream[start : start + length] for start in starts])
    _check_weights(readings, counts, wanted)
    order = interleave(cut, counts, sum(counts))
    return length, [(source, TokenRow(cut[source][place])) for source, place in order]


def _padded(
    readings: Sequence[Reading], wanted: Wanted, rng: np.random.Generator | None
) -> tuple[int, Rows]:
    """Truncate documents of each source to the length, which is returned too."""
    most = wanted.samples
    found = [each.rows(most, wanted.length, stride=wanted.stride, rng=rng) for each in readings]
    weights = [each.source.weight for each in readings]
    drawn = [np.arange(len(rows)) for rows in found]
    if rng is not None and len(readings) > 1:
        # those that are used are drawn too, not the first ones
        drawn = [rng.permutation(len(rows)) for rows in found]
    taken = [[rows[place] for place in places] for rows, places in zip(found, drawn, strict=True)]
    order = interleave(taken, weights, most)
    if len(order) < (1 if wanted.fewer else most):
        last = next(
            number
            for number, rows in enumerate(found)
            if sum(source == number for source, _ in order) == len(rows)
        )
        share = most if len(readings) == 1 and not wanted.fewer else len(found[last]) + 1
        what = f"{len(found[last])} of {share} padded sequences of {wanted.length} tokens"
        raise _too_short(readings[last], what, wanted.stride)
    # each source in its own order
    queues = [
        iter(sorted(places[: sum(source == each for source, _ in order)]))
        for each, places in enumerate(drawn)
    ]
    rows = [(source, found[source][next(queues[source])]) for source, _ in order]
    longest = max(len(row) for _, row in rows)
    return longest if wanted.shorter else wanted.length, rows


def _too_short(reading: Reading, gives: str, stride: int) -> InputError:
    skipped = reading.read["documents_skipped"]
    remedy = "give more text, or ask for fewer or shorter sequences"
    if skipped:
        remedy = f"the images of {skipped} do not fit in a sequence: ask for longer ones"
    return InputError(
        f"{reading.source.name}: {counted(reading.read['documents'], 'document')} with "
        f"{reading.read['tokens_read']} tokens give {gives}"
        f"{f' with stride {stride}' if stride > 1 else ''}; {remedy}"
    )


def _check_weights(readings: Sequence[Reading], counts: Sequence[int], wanted: Wanted) -> None:
    """Raise UsageError if the weight of a source is too small for one sequence."""
    for reading, count in zip(readings, counts, strict=True):
        if not count:
            raise UsageError(
                f"{reading.source.name} has a weight of {reading.source.weight:.3g}, less than one "
                f"of {wanted.samples} sequences; give a larger weight, or more "
                "samples"
            )


def _check_counts(*, samples: int, sequence_length: int, stride: int) -> None:
    counts = {"samples": samples, "sequence_length": sequence_length, "stride": stride}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} is {count}; it must be 1 or above")
    if samples * sequence_length * stride > MAX_TOKENS:
        raise UsageError(
            f"{samples} sequences of {sequence_length} tokens with stride {stride} are requested; "
            f"the limit is {MAX_TOKENS} tokens"
        )


def _check_sampling(layout: str, sampling: str, stride: int) -> None:
    if layout not in LAYOUTS or sampling not in SAMPLINGS:
        raise UsageError(
            f"layout is {layout!r} and sampling {sampling!r}; "
            f"allowed are {', '.join(LAYOUTS)} and {', '.join(SAMPLINGS)}"
        )
    if sampling == "random" and stride != 1:
        raise UsageError(f"stride is {stride}; it applies to sampling first, not to random")
