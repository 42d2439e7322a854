"""Logits of a whole model and of its shards."""

from collections.abc import Sequence

import torch
from families import BLOCKS, VOCABULARY
from transformers import AutoModelForCausalLM

from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel

HALVES = (range(0, 2), range(2, BLOCKS))


def padded_chunk(padding):
    """Make two sequences of 12 tokens, the second with 4 tokens of padding if `padding` is set."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    mask_BT = torch.ones(2, 12, dtype=torch.bool)
    if padding != "none":
        mask_BT[1, 8:] = False
        mask_BT = mask_BT.flip(1) if padding == "left" else mask_BT
    return Chunk(0, tokens_BT * mask_BT, mask_BT)


def whole_model(directory, dtype):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def whole_logits(model, chunk):
    """Compute logits as transformers does: without a mask if there is no padding."""
    mask_BT = None if chunk.mask.all() else chunk.mask.long()
    with torch.no_grad():
        return model(input_ids=chunk.tokens, attention_mask=mask_BT).logits


def sharded_logits(lazy_model: LazyModel, chunk: Chunk, cuts: Sequence[range]):
    for blocks in cuts[:-1]:
        with lazy_model.shard(blocks) as shard:
            chunk = Chunk.unpack(shard.forward(chunk).pack())
    with lazy_model.shard(cuts[-1]) as shard:
        return shard.logits(chunk)
