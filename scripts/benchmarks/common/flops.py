"""Floating-point operations of a calibration; a multiply-add counts as two.

T tokens of one sequence, [O, I] weights, n channels of a Gram. Only matrix products count:

- linears: 2 T O I each, of the targeted and of all others alike;
- attention: queries by keys and weights by values, 2 · 2 T² · heads · head_dim a block. All T²
  positions, because PyTorch's kernel for CPUs computes them all at up to 512 tokens, masked or not;
- Grams: 2 T n² each with every entry, or T n (n + 1) with one triangle, the least that will do.

Not counted: norms, activations, rotary embeddings, softmax, residual sums, and outputs that are
computed a second time for a Gram.
"""

from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.plan.linear import Linear

Side = Callable[[Linear, Sequence[Linear]], str]


def linear_flops(linears: Sequence[Linear], tokens: int) -> int:
    return sum(2 * tokens * linear.values for linear in linears)


def attention_flops(config: Any, tokens: int, blocks: int) -> int:
    """Attention FLOPs of a transformers config with `num_attention_heads` of `head_dim`."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return blocks * 4 * tokens * tokens * heads * head_dim


def gram_flops(channels: Sequence[int], tokens: int, *, triangle: bool) -> int:
    return sum(tokens * n * (n + 1 if triangle else 2 * n) for n in channels)


def gram_channels(linears: Sequence[Linear], side: Side) -> list[int]:
    """Sizes of the Grams that a method's `side` requires; linears of a site share one."""
    sizes = {}
    for linear in linears:
        together = [each for each in linears if each.site == linear.site]
        if side(linear, together) == "input":
            sizes[linear.site] = linear.in_features
        else:
            sizes[f"{linear.name} output"] = linear.out_features
    return list(sizes.values())
