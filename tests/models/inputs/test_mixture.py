"""Mixtures keep weights and order; a short text gives what it has; names and stores are read."""

import json
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import bytes_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InputError, UsageError
from orchestrator.models.inputs.documents import BUNDLED_TEXT
from orchestrator.models.inputs.mixture import Wanted, apportion, fit, interleave
from orchestrator.models.inputs.sources import TextSource, parse_sources
from orchestrator.models.inputs.text import load_tokens

SHORT = {"fewer": True, "shorter": True}


@pytest.fixture(scope="module")
def tokenizer():
    return bytes_tokenizer()


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two texts of one letter each in the working directory, of 1,000 and 100 tokens."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a" * 1000)
    Path("b.txt").write_text("b" * 100)


def load(source, tokenizer, samples, length, **given):
    return load_tokens(
        source, tokenizer=tokenizer, samples=samples, sequence_length=length, **given
    )


weights = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4)
texts_of = st.integers(0, 3000)


@given(total=st.integers(1, 400), weights=weights)
def test_parts_are_within_one_of_their_weight(total, weights):
    """Parts of a number sum to it, and each differs by less than 1 from its exact part."""
    parts = apportion(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1


@given(weights=weights, lengths=st.data())
def test_every_beginning_is_mixed_by_tokens(weights, lengths):
    """After any number of rows a source is at most one row from its share of the tokens, as long as
    none is exhausted; each source keeps its order."""
    rows = [
        [
            np.empty(size)
            for size in lengths.draw(st.lists(st.integers(1, 50), min_size=9, max_size=9))
        ]
        for _ in weights
    ]
    order = interleave(rows, weights, 9)
    used = np.zeros(len(weights))
    for number, (source, place) in enumerate(order, start=1):
        assert place == sum(each == source for each, _ in order[: number - 1])
        used[source] += len(rows[source][place])
        share = used.sum() * np.array(weights) / sum(weights)
        assert np.all(np.abs(used - share) <= 50 * len(weights))


@given(tokens=st.lists(texts_of, min_size=1, max_size=3), data=st.data())
def test_a_short_text_gives_what_it_has(tokens, data):
    """Windows fit into every source; of one short text at most one token a window is left over."""
    size = len(tokens)
    weights = data.draw(st.lists(st.floats(0.05, 1.0), min_size=size, max_size=size))
    weights = [weight / sum(weights) for weight in weights]
    wanted = Wanted(samples=64, length=100, fewer=True, shorter=True)
    length, counts = fit(wanted, tokens, weights)
    assert length <= 100
    if length:
        assert all(0 < part * length <= have for part, have in zip(counts, tokens, strict=True))
        assert sum(counts) <= 64
        if size == 1:
            assert min(tokens[0], 6400) - length * counts[0] < counts[0]
    else:
        assert min(tokens) < 100


@pytest.mark.parametrize(
    ("tokens", "length", "counts"),
    [(6400, 100, 64), (9999, 100, 64), (250, 83, 3), (99, 99, 1), (1, 1, 1), (0, 0, 0)],
)
def test_number_and_length_of_the_sequences_of_one_text(tokens, length, counts):
    """The limits for a text that suffices; otherwise the text divided evenly."""
    wanted = Wanted(samples=64, length=100, fewer=True, shorter=True)
    assert fit(wanted, [tokens], [1.0]) == (length, [counts])


def test_a_mixture_has_the_windows_of_its_sources(texts, tokenizer):
    """0.75 of the windows are the first ones of a.txt, and the report counts each source."""
    Path("a.txt").write_text("".join(map(str, range(200))))
    found = load("a.txt:0.75,b.txt:0.25", tokenizer, 8, 10)
    of_a = found.ids[(found.ids != ord("b")).all(axis=1)]
    assert np.array_equal(of_a, load("a.txt", tokenizer, 6, 10).ids)
    assert [bytes(row[:1].astype(np.uint8)).isalpha() for row in found.ids].count(True) == 2
    reports = found.report["sources"]
    assert [each["source"] for each in reports] == ["a.txt", "b.txt"]
    assert [each["tokens_used"] for each in reports] == [60, 20]
    assert reports[0]["blake2b"] == load("a.txt", tokenizer, 2, 10).report["sources"][0]["blake2b"]
    Path("b.txt").write_text("c" * 100)
    again = load("a.txt:0.75,b.txt:0.25", tokenizer, 8, 10).report["sources"]
    assert again[0] == reports[0]
    assert again[1]["blake2b"] != reports[1]["blake2b"]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_random_mixture_depends_on_the_seed_only(texts, tokenizer, layout):
    """Equal seeds give equal sequences; the weights are kept."""
    for name in "ab":
        lines = [json.dumps({"text": name * (3 + index % 5)}) for index in range(400)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))

    def draw(seed):
        rng = np.random.default_rng(seed)
        options = {"layout": layout, "sampling": "random", "rng": rng}
        return load("a.jsonl:3,b.jsonl:1", tokenizer, 64, 8, **options)

    assert np.array_equal(draw(1).ids, draw(1).ids)
    assert not np.array_equal(draw(1).ids, draw(2).ids)
    used = [each["tokens_used"] for each in draw(1).report["sources"]]
    assert used[0] / sum(used) == pytest.approx(0.75, abs=0.03)


def test_a_scarce_source_is_an_error_if_the_number_is_given(texts, tokenizer):
    """It is named, with what it has; otherwise there are fewer, in the weights to one window."""
    for layout, says in (("packed", "b.txt: .* give 10 of 32"), ("padded", r"txt: 1 document ")):
        with pytest.raises(InputError, match=says):
            load("a.txt:0.5,b.txt:0.5", tokenizer, 64, 10, layout=layout)
    found = load("a.txt:0.5,b.txt:0.5", tokenizer, 64, 10, fewer=True)
    assert [each["sequences"] for each in found.report["sources"]] == [11, 10]


def test_padded_sequences_may_be_fewer_and_shorter(texts, tokenizer):
    """As many as there are documents, and as long as the longest."""
    Path("c.jsonl").write_text('{"text": "abc"}\n{"text": "abcde"}\n')
    found = load("c.jsonl", tokenizer, 8, 100, layout="padded", **SHORT)
    assert found.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]


@pytest.mark.parametrize("source", ["none", "a.txt:0.99,b.txt:0.01"])
def test_a_text_without_a_sequence_is_refused(texts, tokenizer, source):
    """An empty text, or a weight below one sequence."""
    Path("none").mkdir()
    Path("none/empty.txt").touch()
    with pytest.raises((InputError, UsageError), match=r"give 0 of 1 packed|less than one of 8"):
        load(source, tokenizer, 8, 10, fewer=True)


def test_names_with_colons_and_commas(texts):
    """A file of the whole name is one source; in a mixture only a weight ends a name."""
    for name in ("a:0.5,b.txt", "x,y.txt", "a.txt:1"):
        Path(name).write_text("text")
        assert parse_sources(name) == (TextSource(name),)
    assert parse_sources("x,y.txt:3,s3://b/p?c=d:1,datasets:n:c:4,k:.5.txt:2") == (
        TextSource("x,y.txt", 0.3),
        TextSource("s3://b/p?c=d", 0.1),
        TextSource("datasets:n:c", 0.4),
        TextSource("k:.5.txt", 0.2),
    )


@pytest.mark.parametrize(
    ("written", "error", "says"),
    [
        ("a.txt:0,b.txt:1", UsageError, "a.txt has weight 0; a weight is above 0"),
        ("a.txt:1,a.txt:1", UsageError, "a.txt occurs twice"),
        ("a.txt,b.txt", InputError, "a.txt,b.txt: no such .* a mixture is written"),
        ("a.txt:1,none.txt:1", InputError, "none.txt: no such text file"),
        ("a.csv:1,b.txt:1", UsageError, r"a\.csv: text files end in"),
        ("c://x:1,b.txt:1", UsageError, "c:// is not supported"),
    ],
)
def test_a_wrong_mixture_is_refused(texts, tokenizer, written, error, says):
    """Its weights and its sources."""
    Path("a.csv").touch()
    with pytest.raises(error, match=says):
        load(written, tokenizer, 4, 10)


def test_texts_in_a_store_are_those_on_disk(s3, tmp_path, tokenizer):
    """A mixture of a directory and a file in a store is the same as on disk, to the digest."""
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "more").mkdir()
    (tmp_path / "b.txt").write_text("first\n" * 20)
    (tmp_path / "more" / "a.jsonl").write_text('{"text": "second"}\n' * 20)
    parquet.write_table(pyarrow.table({"text": ["third"] * 40}), tmp_path / "c.parquet")
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        name = path.relative_to(tmp_path) if path.suffix != ".parquet" else "c.parquet"
        inner = f"texts/{name}" if path.suffix != ".parquet" else str(name)
        s3.write(f"calibration/{inner}", path.read_bytes())
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "more"):
        (tmp_path / name).rename(tmp_path / "texts" / name)
    there = [s3.uri(f"calibration/{name}") for name in ("texts", "c.parquet")]
    here = [str(tmp_path / name) for name in ("texts", "c.parquet")]
    found, wanted = (
        load(f"{names[0]}:2,{names[1]}:1", tokenizer, 12, 8) for names in (there, here)
    )
    assert np.array_equal(found.ids, wanted.ids)
    digests = [[each["blake2b"] for each in one.report["sources"]] for one in (found, wanted)]
    assert digests[0] == digests[1]
    with pytest.raises(InputError, match="no such text file"):
        load(s3.uri("calibration/none.txt"), tokenizer, 1, 8)


def test_the_bundled_text_is_a_part_of_the_package(tokenizer):
    """It has a text in each record, enough for a model of 8B without a warning, and none of the
    paragraphs that the quickstart holds out."""
    from prepare_texts import split_topics

    records = [json.loads(line) for line in BUNDLED_TEXT.read_text("utf-8").splitlines()]
    assert all({*record} == {"text"} and record["text"].strip() for record in records)
    assert BUNDLED_TEXT.stat().st_size < 400_000
    _, held_out = split_topics()
    paragraphs = {part for record in records for part in record["text"].split("\n\n")}
    long = {part for part in paragraphs if len(part) > 80}
    assert not long & {*held_out.split("\n\n")}
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in BUNDLED_TEXT.with_suffix(".LICENSE").read_text()
    found = load("bundled", tokenizer, 4, 64, layout="padded")
    assert found.report["sources"][0]["source"] == "bundled"
    assert bytes(found.ids[0].astype(np.uint8)).decode() == records[0]["text"][:64]
