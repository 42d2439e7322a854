"""Pictures, captions and inputs of the benchmark of images, without training."""

import json
from pathlib import Path

import pytest

pytest.importorskip("PIL")

from benchmarks.images.pictures import (
    CENTRES,
    COLOURS,
    WORDS,
    DrawnScene,
    Thing,
    scenes,
    write_scenes,
)
from benchmarks.images.tiny_llava import IMAGE_TOKENS, VOCABULARY, make_llava


def test_a_picture_shows_what_its_caption_says():
    """The colours of the four shapes are at their places, and no others are in the picture."""
    colours = ("red", "blue", "green", "white")
    scene = DrawnScene(tuple(Thing("big", each, "square") for each in colours), 3)
    image = scene.draw()
    for colour, centre in zip(colours, CENTRES, strict=True):
        assert image.getpixel(centre) == COLOURS[colour]
    assert len(image.getcolors()) == 5


def test_captions_are_words_of_the_vocabulary(tmp_path):
    """Every caption is encoded without an unknown word, behind the tokens of its image."""
    drawn = scenes(5, 40)
    assert drawn == scenes(5, 40)
    assert {word for scene in drawn for word in scene.caption.split()} == set(WORDS)
    inputs = make_llava(0).inputs(drawn, captions=True)
    rows = inputs["input_ids"].tolist()
    for row, scene in zip(rows, drawn, strict=True):
        words = [VOCABULARY[token] for token in row]
        assert words[:IMAGE_TOKENS] == ["<image>"] * IMAGE_TOKENS
        assert " ".join(words[IMAGE_TOKENS:]).partition(" .")[0] == scene.caption
    path = write_scenes(tmp_path / "a.jsonl", drawn[:2], with_images=True)
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [record["text"] for record in records] == [f"<image> {s.caption} ." for s in drawn[:2]]
    assert all((tmp_path / record["images"][0]).is_file() for record in records)
