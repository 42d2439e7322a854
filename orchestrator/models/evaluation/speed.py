"""Measurement of decoding time per token, shard by shard.

Shape suffixes: B sequences, T tokens, C channels.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from orchestrator.device.timing import Stopwatch
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.shard import Shard

PROMPT_TOKENS = 64
DECODED_TOKENS = 8


Pass = Callable[[], object]
"""A pass of one token."""


def decode_seconds(
    shards: Mapping[str, Shard], chunks: Mapping[str, Chunk], device: torch.device
) -> dict[str, float | None]:
    """Measure each shard's median time to decode one token of one sequence, with a KV cache.

    The chunk's first tokens, at most 64, are the prompt, and its next 8 are treated as generated:
    in a causal model a token's state at the shard's input is the same. Every token passes all
    shards before the next one, in an order that is reversed each time. None if the chunk is too
    short or has padding there, or if the family's block state cannot be cut by token.

    Args:
        shards: The same blocks of several models, by name.
        chunks: The chunk at the input of each of them.
    """
    passes = {name: _passes(shard, chunks[name]) for name, shard in shards.items()}
    watch, seconds = Stopwatch(device), {name: list[float]() for name in shards}
    names = [name for name, each in passes.items() if each]
    for token in range(DECODED_TOKENS):
        for name in names:
            seconds[name].append(watch.seconds(passes[name][token]))
        names.reverse()
    return {name: statistics.median(each) if each else None for name, each in seconds.items()}


def _passes(shard: Shard, chunk: Chunk) -> list[Pass]:
    """Pass the prompt; return the passes of the tokens after it, none if they cannot be cut."""
    prompt = min(PROMPT_TOKENS, chunk.tokens.shape[1] - DECODED_TOKENS)
    if prompt < 1 or not bool(chunk.mask[0, : prompt + DECODED_TOKENS].all()):
        return []
    cut = [_tokens(chunk, prompt + n, prompt + n + 1) for n in range(DECODED_TOKENS)]
    start = _tokens(chunk, 0, prompt)
    if start is None or any(step is None for step in cut):
        return []
    cache = DynamicCache(config=shard.config)
    run = shard.logits if shard.is_last else shard.forward
    run(start, cache)
    return [partial(run, step, cache) for step in cut if step is not None]


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
