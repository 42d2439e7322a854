"""Processors of images and text, and pictures."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from families import VOCABULARY
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
)

from image_text.families import IMAGE, IMAGE_END, IMAGE_START, PATCH, SIDE

COMPANIONS = {
    "preprocessor_config.json": '{"do_resize": true}',
    "processor_config.json": '{"patch_size": 7}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
}
"""Files beside a tokenizer that a processor is made of, by name; not read on text alone."""
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
)


def _tokenizer(special: Mapping[str, int], **named: str) -> PreTrainedTokenizerFast:
    """Tokenizer of single characters, some of which special tokens replace.

    Args:
        special: Special tokens, in the place of characters near the end of the alphabet.
        named: Special tokens by the names of the tokenizer's attributes.
    """
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - 1)]
    vocabulary = {character: n for n, character in enumerate([*characters, "\n"])}
    vocabulary = {c: n for c, n in vocabulary.items() if n not in special.values()}
    inner = Tokenizer(models.WordLevel(vocabulary | dict(special), unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.add_special_tokens([*special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="?", extra_special_tokens=named
    )


def _llava() -> ProcessorMixin:
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=_tokenizer({"<image>": IMAGE}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _gemma3() -> ProcessorMixin:
    special = {"<soft>": IMAGE, "<boi>": IMAGE_START, "<eoi>": IMAGE_END}
    named = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(images, _tokenizer(special, **named), image_seq_length=4)


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {"llava": _llava, "gemma3_vl": _gemma3}
"""Processors that need no torchvision, by family."""


def add_processor(family: str, directory: Path) -> Path:
    """Add the family's processor to a tiny model."""
    PROCESSORS[family]().save_pretrained(directory)
    return directory


def add_qwen_processor(directory: Path) -> Path:
    """Add the files of a Qwen3-VL processor, whose part for videos needs torchvision, to a model.

    They are those that its checkpoints have; the class cannot be made without torchvision.
    """
    special = {"<|image_pad|>": IMAGE, "<|video_pad|>": IMAGE + 1}
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    _tokenizer(special, **named).save_pretrained(directory)
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": 4 * SIDE * SIDE}
    images = Qwen2VLImageProcessorPil(
        size=size, patch_size=PATCH, merge_size=2, temporal_patch_size=2
    )
    about = {"processor_class": "Qwen3VLProcessor"}
    files = {
        "preprocessor_config.json": images.to_dict() | about,
        "video_preprocessor_config.json": about
        | {"size": size, "video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def picture(number: int, width: int = 40, height: int = 30) -> bytes:
    """Make a PNG of two colours that depend on the number."""
    from PIL import Image

    colour = (40 * number % 256, 90 * number % 256, 255 - 30 * number % 256)
    image = Image.new("RGB", (width, height), colour)
    image.paste((255, 255, 0), (number, number, width // 2 + number, height // 2))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_records(path: Path, records: Sequence[Mapping[str, Any]], images: int = 0) -> str:
    """Write records as .jsonl or .parquet; and pictures `pictures/0.png`, ... beside them."""
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        (path.parent / "pictures" / f"{number}.png").write_bytes(picture(number))
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([*records]), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
