"""Sequences with an image for every family, as its processor would make them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from image_text.families import IMAGE, IMAGE_END, IMAGE_START, PATCH, SIDE
from orchestrator.models.shards.chunk import Chunk

_SHAPES = {
    "llava": (1, 3, SIDE, SIDE),
    "llava_next": (1, 3, 3, SIDE, SIDE),
    "llava_onevision": (1, 3, 3, SIDE, SIDE),
    "gemma3_vl": (1, 3, SIDE, SIDE),
}
_IMAGE_TOKENS = {"llava": 16, "llava_next": 52, "llava_onevision": 52, "gemma3_vl": 4}
"""Tokens of the image; those of two tiles have their newlines."""
_BY_TOKEN = ("mm_token_type_ids", "token_type_ids")
_QWEN_GRID = (1, 4, 6)
"""Time, height and width of an image in patches; four patches make a token."""


def image_inputs(family: str, image: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Make tokens [1, T], of which some stand for the image, and the other inputs by name."""
    generator = torch.Generator().manual_seed(5 + image)
    inputs: dict[str, Tensor] = {}
    if family.startswith("qwen"):
        time, height, width = _QWEN_GRID
        patches = time * height * width
        inputs["pixel_values"] = torch.randn(patches, 2 * 3 * PATCH * PATCH, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([_QWEN_GRID])
        count = patches // 4
    else:
        inputs["pixel_values"] = torch.randn(_SHAPES[family], generator=generator)
        if family in ("llava_next", "llava_onevision"):
            inputs["image_sizes"] = torch.tensor([[SIDE, 50]])
        count = _IMAGE_TOKENS[family]
    middle = [IMAGE] * count
    has_ends = family.startswith(("qwen", "gemma3"))
    if has_ends:
        middle = [IMAGE_START, *middle, IMAGE_END]
    before, after = (torch.randint(3, 80, (n,), generator=generator) for n in (5, 9))
    tokens_BT = torch.cat([before, torch.tensor(middle), after])[None]
    if has_ends:
        kinds = "mm_token_type_ids" if family.startswith("qwen") else "token_type_ids"
        inputs[kinds] = (tokens_BT == IMAGE).long()
    return tokens_BT, inputs


def image_chunk(family: str, padding: int = 4, image: int = 0) -> Chunk:
    """Make a chunk of one sequence with an image, and padding on the right."""
    tokens_BT, inputs = image_inputs(family, image)
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    by_token = {name: pad(inputs[name], (0, padding)) for name in inputs if name in _BY_TOKEN}
    return Chunk(
        image, pad(tokens_BT, (0, padding)), pad(mask_BT, (0, padding)), inputs=inputs | by_token
    )
