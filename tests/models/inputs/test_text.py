"""Texts become exactly the requested token sequences, or an error with counts."""

import json
import sys
from itertools import pairwise

import numpy as np
import pyarrow
import pytest
from byte_tokenizer import BOS, bytes_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from orchestrator.errors import InputError, UsageError
from orchestrator.models.inputs import reading
from orchestrator.models.inputs.documents import READ_BYTES, read_documents
from orchestrator.models.inputs.text import load_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


def ids_of(text):
    return list(text.encode())


@pytest.fixture
def write(tmp_path):
    """Write documents in any of the formats, in the field `text` where the format has fields."""

    def write(name, documents, field="text"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jsonl":
            lines = [json.dumps({"id": 1, field: document}) for document in documents]
            path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        elif path.suffix == ".parquet":
            table = pyarrow.table({"id": range(len(documents)), field: documents})
            parquet.write_table(table, path)
        else:
            (document,) = documents
            path.write_bytes(document.encode())
        return str(path)

    return write


def test_plain_file_is_encoded_whole(write, tokenizer):
    """Windows of one plain text are slices of its encoding."""
    text = "".join(chr(97 + i % 26) for i in range(100))
    tokens = load_tokens(write("a.txt", [text]), tokenizer=tokenizer, samples=3, sequence_length=16)
    assert tokens.ids.dtype == np.int32
    assert tokens.ids.shape == tokens.mask.shape == (3, 16)
    assert tokens.ids.ravel().tolist() == ids_of(text)[:48]
    assert tokens.mask.all()
    assert tokens.report["tokens_used"] == 48
    assert tokens.report["tokens_read"] == 100


def test_stride_skips_windows(write, tokenizer):
    """With stride k the windows are 0, k, 2k, ... of the contiguous ones."""
    path = write("a.txt", ["".join(map(str, range(400)))])
    options = {"tokenizer": tokenizer, "sequence_length": 8}
    every = load_tokens(path, samples=31, **options)
    apart = load_tokens(path, samples=4, stride=10, **options)
    assert np.array_equal(apart.ids, every.ids[::10])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_packed_documents_are_joined_by_a_blank_line(write, tokenizer, name):
    """Records are joined by a blank line, blank records included."""
    documents = ["first\n", "", "sécond", "third"]
    joined = ids_of("\n\n".join(documents))
    tokens = load_tokens(
        write(name, documents), tokenizer=tokenizer, samples=1, sequence_length=len(joined)
    )
    assert tokens.ids[0].tolist() == joined
    assert tokens.report["documents"] == 4


def test_directory_is_read_in_order_of_paths(write, tmp_path, tokenizer):
    """A directory is read as its text files at any depth, sorted; other files are ignored."""
    write("b.jsonl", ["two"])
    write("a.txt", ["one"])
    write("c/a.parquet", ["three"])
    write("README.md", ["no"])
    wanted = ids_of("one\n\ntwo\n\nthree")
    tokens = load_tokens(str(tmp_path), tokenizer=tokenizer, samples=1, sequence_length=len(wanted))
    assert tokens.ids[0].tolist() == wanted


def test_padded_documents(write, tokenizer):
    """Each document is a row, truncated or padded on the right; the mask is true on its tokens."""
    documents = ["abcdefgh", " ", "abc", "abcd"]
    tokens = load_tokens(
        write("a.jsonl", documents),
        tokenizer=tokenizer,
        samples=3,
        sequence_length=4,
        layout="padded",
    )
    assert tokens.mask.sum(axis=1).tolist() == [4, 3, 4]
    assert tokens.ids[tokens.mask].tolist() == ids_of("abcdabcabcd")
    assert tokens.report["tokens_used"] == 11
    assert tokens.report["documents_cut"] == 1


def test_special_tokens_occur_once_in_packed_text_and_in_each_padded_row(write):
    """A BOS that the tokenizer adds starts the packed text, and every padded document."""
    path = write("a.jsonl", ["abcd", "efgh"])
    options = {"tokenizer": bytes_tokenizer(adds_bos=True), "sequence_length": 4, "samples": 2}
    packed = load_tokens(path, **options)
    assert packed.ids.ravel().tolist() == [BOS, *ids_of("abcd\n\ne")]
    padded = load_tokens(path, layout="padded", **options)
    assert padded.ids.ravel().tolist() == [BOS, *ids_of("abc"), BOS, *ids_of("efg")]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_random_sampling_depends_on_the_seed_only(write, tokenizer, layout):
    """The choice depends only on the seed, and all tokens are from the text."""
    documents = [f"{index:04d}" for index in range(64)]
    path = write("a.jsonl", documents)

    def draw(seed):
        return load_tokens(
            path,
            tokenizer=tokenizer,
            samples=8,
            sequence_length=4,
            sampling="random",
            layout=layout,
            rng=np.random.default_rng(seed),
        ).ids

    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    whole = "\n\n".join(documents).encode()
    assert all(bytes(row.tolist()) in whole for row in draw(1))
    if layout == "padded":
        rows = [bytes(row.tolist()) for row in draw(1)]
        assert rows == sorted(set(rows))


@given(
    pieces=st.lists(st.text("ab\n", max_size=12), max_size=6),
    cuts=st.lists(st.integers(0, 72), max_size=6),
)
def test_pieces_depend_on_the_text_alone(pieces, cuts):
    """The pieces of a text do not depend on its fragments, are complete and within the limit."""
    text = "".join(pieces)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    fragments = [text[start:stop] for start, stop in pairwise(edges)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_CHARACTERS", 8)
        found = list(reading.pieces(fragments))
        assert found == list(reading.pieces([text]))
    assert "".join(found) == text
    assert all(len(piece) <= 8 for piece in found)


def test_first_reads_no_further_than_needed(write, tokenizer, monkeypatch):
    """`first` stops before a later document that cannot be read."""
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 2**12)
    path = write("a.jsonl", ["x" * reading.PIECE_CHARACTERS, "y"])
    with open(path, "ab") as file:
        file.write(b"not json\n")
    options = {"tokenizer": tokenizer, "samples": 2, "sequence_length": 8}
    assert load_tokens(path, **options).ids.tolist() == [[120] * 8] * 2
    with pytest.raises(InputError, match="line 4: not JSON"):
        load_tokens(path, sampling="random", **options)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("sampling", ["first", "random"])
@pytest.mark.parametrize("documents", [[], [""], ["abc"]])
def test_too_short(write, tokenizer, documents, layout, sampling):
    """A text that is too short is refused with the tokens found and requested."""
    path = write("a.jsonl", documents)
    with pytest.raises(InputError, match=r"of 3 (packed|padded) sequences of 4 tokens"):
        load_tokens(
            path,
            tokenizer=tokenizer,
            samples=3,
            sequence_length=4,
            layout=layout,
            sampling=sampling,
        )


def test_too_short_counts(write, tokenizer):
    """The error for a short text counts its documents, tokens and windows."""
    with pytest.raises(InputError, match="1 document with 20 tokens give 2 of 3 packed"):
        load_tokens(write("a.txt", ["x" * 20]), tokenizer=tokenizer, samples=3, sequence_length=8)


def test_incomplete_character_at_the_end(tmp_path, tokenizer):
    """A plain file truncated within a character is read up to that character."""
    path = tmp_path / "a.txt"
    path.write_bytes("abcdé".encode()[:-1])
    tokens = load_tokens(str(path), tokenizer=tokenizer, samples=1, sequence_length=4)
    assert tokens.report["tokens_read"] == 4


@pytest.mark.parametrize(
    ("name", "head"),
    [("a.txt", b"x" + b"\xc3\xa9" * READ_BYTES), ("a.jsonl", b'{"text":"ok"}\n{"text":"')],
    ids=["a.txt", "a.jsonl"],
)
def test_undecodable(tmp_path, name, head):
    """An undecodable byte is named by its offset in the file, also after the first read."""
    path = tmp_path / name
    path.write_bytes(head + b'\xff"}\n')
    with pytest.raises(InputError, match=f"byte 0xff at offset {len(head)} is not UTF-8"):
        [list(document) for document in read_documents(str(path), "text")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_missing_field(write, name):
    """A missing field is refused; the existing fields are listed."""
    with pytest.raises(InputError, match="no field 'text'; fields found: body, id"):
        list(read_documents(write(name, ["x"], field="body"), "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_field_that_is_not_a_string(write, name):
    """A field of another type is refused with its type."""
    with pytest.raises(InputError, match="field 'id' holds int, not a string"):
        list(read_documents(write(name, ["x"]), "id"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "[1]", "line 1: found list"),
        ("a.jsonl", '{"text": ', "line 1: not JSON"),
        ("a.parquet", "no parquet", "not a readable parquet file"),
    ],
)
def test_damaged_file(tmp_path, name, content, says):
    """A damaged file is refused with the place of the damage."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        list(read_documents(str(path), "text"))


def test_missing_source(tmp_path):
    """A path that does not exist and a directory without texts are invalid input."""
    with pytest.raises(InputError, match="no such text"):
        list(read_documents(str(tmp_path / "none.txt"), "text"))
    with pytest.raises(InputError, match="no text files in this directory"):
        list(read_documents(str(tmp_path), "text"))


def test_source_of_unknown_kind(write):
    """A file of an unknown kind is an invalid argument."""
    with pytest.raises(UsageError, match=r"end in \.txt"):
        list(read_documents(write("a.csv", ["x"]), "text"))


def test_datasets_is_optional(monkeypatch):
    """Without `datasets` installed, a source that needs it names the command to install it."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install"):
        list(read_documents("datasets:wikitext", "text"))


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 0},
        {"sequence_length": 0},
        {"stride": 0},
        {"layout": "x"},
        {"sampling": "x"},
        {"sampling": "random", "stride": 2},
    ],
)
def test_wrong_argument(write, tokenizer, changes):
    """An argument out of range is refused before any file is read."""
    options = {"samples": 1, "sequence_length": 4, **changes}
    with pytest.raises(UsageError):
        load_tokens("nowhere", tokenizer=tokenizer, **options)
