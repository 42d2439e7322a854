"""Regions of a model's tensors: before its blocks, in a block, or after them; sizes of each."""

from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PretrainedConfig

from orchestrator.models.checkpoint.stored_tensor import Region
from orchestrator.models.survey.discovery import Discovery
from orchestrator.plan.linear import ModelSizes


def block_of(name: str, prefix: str) -> int | None:
    """Index of the block that contains a tensor; None outside the blocks.

    Args:
        prefix: Module name of the list of blocks.
    """
    start = f"{prefix}."
    return int(name[len(start) :].split(".")[0]) if name.startswith(start) else None


def find_regions(
    order: Sequence[str], prefix: str, discovery: Discovery
) -> dict[str, tuple[Region, int | None]]:
    """Return the region of every tensor, and its block.

    Tensors not used for text (a vision tower) belong to the front if they precede the blocks, else
    to the tail.

    Args:
        order: Names of all tensors, in model order.
        prefix: Module name of the list of blocks.
    """
    blocks = {name: block_of(name, prefix) for name in order}
    first_block = min(i for i, name in enumerate(order) if blocks[name] is not None)
    front = set(discovery.front)
    tail = set(discovery.tail) - front
    regions: dict[str, tuple[Region, int | None]] = {}
    for position, name in enumerate(order):
        if blocks[name] is not None:
            regions[name] = "block", blocks[name]
        elif name in front or (name not in tail and position < first_block):
            regions[name] = "front", None
        else:
            regions[name] = "tail", None
    return regions


def model_sizes(
    tensors: Iterable[tuple[Region, int | None, int]], config: PretrainedConfig
) -> ModelSizes:
    """Return the sizes of a model from region, block and values of each of its tensors."""
    values = Counter[Region]()
    blocks = Counter[int | None]()
    for region, block, count in tensors:
        values[region] += count
        if region == "block":
            blocks[block] += count
    text = config.get_text_config(decoder=True)
    return ModelSizes(
        front=values["front"],
        block=max(blocks.values()),
        tail=values["tail"],
        total=values.total(),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
    )
