"""Blocks of a model that are built equally, so that a survey looks at one of each kind."""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from orchestrator.plan.linear import ExpertsModule, Linear

_PLAIN = (bool, int, float, str, type(None))
_PLACE = re.compile(r"((layer|block)_?)?(idx|id|index|number)")
"""Attributes in which a module keeps the number of its block."""


def find_repeats(blocks: nn.ModuleList) -> tuple[int, ...]:
    """Return for every block the first one that is built equally, itself if it is the first.

    Equal are all modules' names and classes, the shapes and dtypes of their parameters and buffers,
    and their plain attributes (kind of attention, window, sizes), except the number of the block.
    """
    first: dict[Hashable, int] = {}
    return tuple(first.setdefault(_build(block), i) for i, block in enumerate(blocks))


def _build(block: nn.Module) -> Hashable:
    """Return everything by which blocks are compared."""
    found = []
    for path, module in block.named_modules():
        plain = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, _PLAIN) and not name.startswith("_") and not _PLACE.fullmatch(name)
        )
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = tuple((name, each.shape, each.dtype) for name, each in tensors)
        found.append((path, type(module), plain, shapes))
    return tuple(found)


def repeat_linears(linears: Iterable[Linear], prefix: str, block: int) -> Iterator[Linear]:
    """Yield the linears of an equal block.

    Args:
        linears: Those of the first block of the kind.
        prefix: Module name of the list of blocks.
        block: Index of the other block.
    """
    for each in linears:
        name, site, norm = (
            _moved(name, prefix, each.block, block) for name in (each.name, each.site, each.norm)
        )
        yield replace(each, block=block, name=name, site=site, norm=norm)


def repeat_experts(
    found: Sequence[ExpertsModule], prefix: str, first: Sequence[int]
) -> tuple[ExpertsModule, ...]:
    """Return the experts modules of all blocks from those of the first blocks of each kind.

    Args:
        prefix: Module name of the list of blocks.
        first: First block of the kind of every block.
    """
    return tuple(
        replace(
            each,
            name=_moved(each.name, prefix, source, block),
            block=block,
            router=tuple(_moved(name, prefix, source, block) for name in each.router),
        )
        for block, source in enumerate(first)
        for each in found
        if each.block == source
    )


def _moved(name: str, prefix: str, source: int, block: int) -> str:
    """Return the name of the same module in another block; empty stays empty."""
    return f"{prefix}.{block}." + name.removeprefix(f"{prefix}.{source}.") if name else name
