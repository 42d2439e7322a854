"""A random block of a 70B Llama and sequences for it, used by several parts."""

from pathlib import Path

import torch
from benchmarks.common.synthetic import CHARACTERS, config_of, write_model
from benchmarks.gpu.bench import Bench

from orchestrator.models.shards.chunk import Chunk


def one_block(bench: Bench) -> Path:
    """A checkpoint of one block, written once for all parts."""
    directory = bench.work / "one-block"
    if not (directory / "tokenizer.json").exists():  # the last file written
        hidden, intermediate = bench.size((8192, 28_672), (256, 512))
        write_model(directory, config_of(blocks=1, hidden=hidden, intermediate=intermediate))
    return directory


def sequences(count: int, tokens: int) -> list[Chunk]:
    """Chunks at the model's input, without padding."""
    generator = torch.Generator().manual_seed(0)
    mask_BT = torch.ones(1, tokens, dtype=torch.bool)
    return [
        Chunk(index, torch.randint(len(CHARACTERS), (1, tokens), generator=generator), mask_BT)
        for index in range(count)
    ]
