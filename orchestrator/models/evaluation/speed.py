"""Measurement of decoding time per token, shard by shard.

Shape suffixes: B sequences, T tokens, C channels.
"""

import statistics
import time

import torch
from torch import Tensor
from transformers import DynamicCache

from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard

PROMPT_TOKENS = 64
DECODED_TOKENS = 8


def decode_seconds(shard: Shard, chunk: Chunk) -> float | None:
    """Measure the shard's median time to decode one token of one sequence, with a KV cache.

    The chunk's first tokens, at most 64, are the prompt, and its next 8 are treated as generated:
    in a causal model a token's state at the shard's input is the same. Returns None if the chunk
    is too short or has padding there, or if the family's block state cannot be cut by token.
    """
    prompt = min(PROMPT_TOKENS, chunk.tokens.shape[1] - DECODED_TOKENS)
    if prompt < 1 or not bool(chunk.mask[0, : prompt + DECODED_TOKENS].all()):
        return None
    cut = [_tokens(chunk, prompt + n, prompt + n + 1) for n in range(DECODED_TOKENS)]
    start = _tokens(chunk, 0, prompt)
    if start is None or any(step is None for step in cut):
        return None
    cache = DynamicCache(config=shard.config)
    run = shard.logits if shard.is_last else shard.forward
    run(start, cache)
    seconds = []
    for step in cut:
        begun = _now()
        assert step is not None
        run(step, cache)
        seconds.append(_now() - begun)
    return statistics.median(seconds)


def _tokens(chunk: Chunk, start: int, stop: int) -> Chunk | None:
    """Cut tokens start to stop of the chunk's first sequence, with their part of the state."""
    tokens, mask = chunk.tokens[:1, start:stop], chunk.mask[:1, start:stop]
    payload = chunk.payload
    if payload is not None:
        length = chunk.tokens.shape[1]
        if payload.extras or any(t.ndim != 3 or t.shape[1] != length for t in payload.tensors()):
            return None

        def cut(state_BTC: Tensor) -> Tensor:
            return state_BTC[:1, start:stop]

        payload = payload.map(cut)
    return Chunk(chunk.index, tokens, mask, payload)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
