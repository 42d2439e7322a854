"""Records with images become the arrays of the model's processor, or an error in one line."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from image_text.families import IMAGE
from image_text.processors import (
    PROCESSORS,
    add_processor,
    add_qwen_processor,
    picture,
    write_records,
)
from transformers import AutoImageProcessor, AutoProcessor

from orchestrator.errors import InputError
from orchestrator.models.inputs.image_reader import ImageReader
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer

Image = pytest.importorskip("PIL.Image")
ASKED = [{"type": "image"}, {"type": "text", "text": "what"}]
ANSWER = [{"type": "text", "text": "a bird"}]
WITH_PATH = {"type": "image", "path": "pictures/0.png"}
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Processors by family, without a model."""
    root = tmp_path_factory.mktemp("processors")
    return {family: add_processor(family, root / family) for family in PROCESSORS}


def load(directory, source, **options):
    options = {"samples": 8, "sequence_length": 64, "fewer": True, "shorter": True} | options
    reader = ImageReader(directory, IMAGE)
    return load_tokens(source, tokenizer=load_tokenizer(directory), images=reader, **options)


def by_processor(directory, text, *pictures, **options):
    """The arrays of transformers' own processor."""
    images = [Image.open(io.BytesIO(each)).convert("RGB") for each in pictures] or None
    processor = AutoProcessor.from_pretrained(directory)
    return processor(text=[text], images=images, return_tensors="np", **options)


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_are_encoded_as_by_the_processor(directory, tmp_path, family, name):
    """Paths and bytes give its arrays, padded; two images and none are rows among them."""
    images = [picture(n) for n in range(2)]
    given = (
        [{"bytes": each, "path": "x.png"} for each in images]
        if name == "a.parquet"
        else ["pictures/0.png", "pictures/1.png"]
    )
    records = [
        {"text": "a <image> b", "images": given[:1]},
        {"text": "no image in this one", "images": []},
        {"text": "<image>, <image>", "images": given},
    ]
    found = load(directory[family], write_records(tmp_path / name, records, 2))
    placeholder = AutoProcessor.from_pretrained(directory[family]).image_token
    texts = [record["text"].replace("<image>", placeholder) for record in records]
    shown = [images[:1], [], images]
    for row, (text, pictures) in enumerate(zip(texts, shown, strict=True)):
        wanted = by_processor(directory[family], text, *pictures)
        ids = wanted.pop("input_ids")[0]
        wanted.pop("attention_mask")
        assert found.ids[row][found.mask[row]].tolist() == ids.tolist()
        assert found.is_image[row].sum() == (ids == IMAGE).sum()
        inputs = found.inputs.get(row, {})
        assert inputs.keys() == (wanted.keys() if pictures else set())
        for key, array in inputs.items():
            if key == "token_type_ids":
                assert array.shape == found.ids[row : row + 1].shape
                assert array.sum() == wanted[key].sum()
            else:
                assert np.array_equal(array, wanted[key])
    tokens = int((found.ids == IMAGE).sum())
    counts = {name: found.report[name] for name in ("images", "image_tokens", "text_tokens")}
    used = found.report["tokens_used"]
    assert counts == {"images": 3, "image_tokens": tokens, "text_tokens": used - tokens}
    assert found.report["layout"] == "padded"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "images": ["pictures/0.png"]},
        {"messages": [{"role": "user", "content": [WITH_PATH, ASKED[1]]}, CHAT[1]]},
        {"conversations": [{"from": "human", "value": "<image>\nwhat"},
                           {"from": "gpt", "value": "a bird"}], "image": "pictures/0.png"},
    ],
    ids=["parts", "paths in parts", "ShareGPT"],
)  # fmt: skip
def test_chats_are_written_by_the_processors_template(directory, tmp_path, record):
    """All forms of a chat with an image give the tokens of `apply_chat_template`."""
    found = load(directory["llava"], write_records(tmp_path / "a.jsonl", [record], 1))
    processor = AutoProcessor.from_pretrained(directory["llava"])
    text = processor.apply_chat_template(CHAT, tokenize=False)
    wanted = by_processor(directory["llava"], text, picture(0), add_special_tokens=False)
    assert found.ids[0].tolist() == wanted["input_ids"][0].tolist()
    assert (found.report["sources"][0]["chats"], found.report["images"]) == (1, 1)
    plain = load(directory["llava"], str(tmp_path / "a.jsonl"), chat_template="off")
    assert plain.ids[0].tolist() != found.ids[0].tolist()
    assert plain.report["images"] == 1


def test_no_image_is_cut(directory, tmp_path):
    """A record is cut behind its last image token, or skipped and counted."""
    records = [
        {"text": f"{words}<image>{words}", "images": ["pictures/0.png"]}
        for words in ("abc", "a long beginning before it", "de")
    ]
    found = load(
        directory["llava"], write_records(tmp_path / "a.jsonl", records, 1), sequence_length=20
    )
    assert found.report["sequences"] == 2
    assert found.report["documents_skipped"] == 1
    assert found.report["documents_cut"] == 1
    assert (found.ids == IMAGE).sum(axis=1).tolist() == [16, 16]
    with pytest.raises(
        InputError, match="the images of 3 do not fit in a sequence: ask for longer"
    ):
        load(directory["llava"], str(tmp_path / "a.jsonl"), sequence_length=15)


def test_orientation_and_colours_are_those_of_a_viewer(directory, tmp_path):
    """An image is turned by its EXIF entry, and made RGB."""
    turned = Image.new("L", (30, 40), 7)
    turned.paste(250, (0, 0, 30, 10))
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "pictures").mkdir()
    turned.save(tmp_path / "pictures" / "0.png", exif=exif)
    record = {"text": "<image>", "images": ["pictures/0.png"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    found = load(directory["llava"], str(tmp_path / "a.jsonl"))
    file = io.BytesIO()
    turned.rotate(180).convert("RGB").save(file, "PNG")
    wanted = by_processor(directory["llava"], "<image>", file.getvalue())
    assert np.array_equal(found.inputs[0]["pixel_values"], wanted["pixel_values"])


def test_without_a_reader_images_are_left_out(directory, tmp_path):
    """A model of text reads the text of such records, as before."""
    record = {"text": "a bird", "images": ["nowhere.png"]}
    source = write_records(tmp_path / "a.jsonl", [record])
    tokenizer = load_tokenizer(directory["llava"])
    found = load_tokens(source, tokenizer=tokenizer, samples=1, sequence_length=6)
    assert found.is_image is None
    assert not found.inputs


def header(width, height):
    """A PNG that states its size and has no pixels."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT"


BAD = {
    "missing": ("pictures/none.png", "image 1 'pictures/none.png': no such file in "),
    "outside": ("../secret.png", "image 1 '../secret.png': lies outside of "),
    "absolute": ("/etc/hostname", "lies outside of "),
    "link": ("link.png", "lies outside of "),
    "address": ("https://example.org/a.png", "is a URL; download the image"),
    "truncated": ("truncated.png", "cannot be decoded: .*truncated"),
    "text": ("a.jsonl", "is no image of the formats PNG, JPEG"),
    "large": ("large.png", "9000 x 9000 pixels are above the limit of 67,108,864; scale it down"),
    "bomb": ("bomb.png", "exceeds limit .*; scale it down"),
    "type": (7, "line 1, image 1: found int; an image is a path"),
    "neither": ({"bytes": None, "path": None}, "found neither bytes nor a path"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_image_that_cannot_be_read_is_one_line(directory, tmp_path, case):
    """The line names the record, the image, and what to do; nothing outside is opened."""
    root = tmp_path / "data"
    image, message = BAD[case]
    source = write_records(root / "a.jsonl", [{"text": "<image>", "images": [image]}])
    (tmp_path / "secret.png").write_bytes(picture(0))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "truncated.png").write_bytes(picture(0)[:-40])
    (root / "large.png").write_bytes(header(9000, 9000))
    (root / "bomb.png").write_bytes(header(100_000, 100_000))
    with pytest.raises(InputError, match=message) as caught:
        load(directory["llava"], source)
    assert "\n" not in str(caught.value)
    assert "a.jsonl, line 1" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "two <image> <image>", "images": ["pictures/0.png"]}, "2 placeholders"),
        ({"text": "none", "images": ["pictures/0.png"]}, "0 placeholders .* 1 image"),
        ({"text": "an <image>", "images": []}, "1 placeholder .* 0 images"),
        ({"messages": CHAT}, "1 placeholder .* 0 images"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "part of type 'video'"),
    ],
)  # fmt: skip
def test_a_record_without_its_images_is_refused(directory, tmp_path, record, message):
    """Each image has one placeholder, and each placeholder one image."""
    good = {"text": "<image>", "images": ["pictures/0.png"]}
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=f"line 2.*{message}"):
        load(directory["llava"], write_records(path, [good | {"messages": None}, record], 1))


def test_text_with_placeholders_alone_is_refused(directory, tmp_path):
    """Without any image the tokens of the text are searched for that of an image."""
    source = write_records(tmp_path / "a.jsonl", [{"text": "an <image> without an image"}])
    tokens = load(directory["llava"], source)
    with pytest.raises(InputError, match=r"placeholder of an image \(token 90\) without an image"):
        tokens.check_within(96, "model", image_token=IMAGE)


def test_a_directory_without_a_processor_is_refused(tmp_path):
    """One line names the files that are missing."""
    add_processor("llava", tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    source = write_records(
        tmp_path / "a.jsonl", [{"text": "<image>", "image": "pictures/0.png"}], 1
    )
    with pytest.raises(InputError, match="has no processor of images"):
        load(tmp_path / "model", source)


def test_qwen_needs_no_torchvision(tmp_path):
    """Pixels are those of its image processor; an image has a token for every four patches."""
    directory = add_qwen_processor(tmp_path)
    source = write_records(
        tmp_path / "a.jsonl", [{"text": "a <image> b", "images": ["pictures/0.png"]}], 1
    )
    found = load(directory, source)
    image = Image.open(tmp_path / "pictures" / "0.png").convert("RGB")
    expected = AutoImageProcessor.from_pretrained(directory)(image, return_tensors="np")
    assert np.array_equal(found.inputs[0]["pixel_values"], expected["pixel_values"])
    (grid,) = expected["image_grid_thw"]
    is_image = found.ids[0] == IMAGE
    assert is_image.sum() == grid.prod() // 4
    assert np.array_equal(found.inputs[0]["mm_token_type_ids"][0], is_image)
