"""Attention's backward pass: repeatability of its bits, and cost of strict algorithms."""

from typing import Any

import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TURNS = 4
CHANNELS = 128
"""Channels of a head."""


def measure(bench: Bench) -> PartResult:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for is_strict in (False, True):
            with_strict(is_strict)
            try:
                rows.append({"dtype": str(dtype), "strict": is_strict, **turns(bench, dtype)})
            finally:
                with_strict(False)
    parts = [
        f"{row['dtype'].removeprefix('torch.')}{' strict' if row['strict'] else ''} "
        f"{1e3 * row['seconds']:.2f} ms, {'same' if row['same_bits'] else 'OTHER'} bits"
        for row in rows
    ]
    # without strict algorithms other bits are allowed: a figure, not a check
    checks = tuple(
        Check(f"same bits, {row['dtype']}, strict", row["same_bits"])
        for row in rows
        if row["strict"]
    )
    return PartResult("; ".join(parts), rows, checks)


def with_strict(is_strict: bool) -> None:
    torch.use_deterministic_algorithms(is_strict)
    # tensors that are filled before they are written would be timed too
    torch.utils.deterministic.fill_uninitialized_memory = not is_strict


def turns(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    heads, tokens = bench.size((64, 2048), (4, 32))
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (1, heads, tokens, CHANNELS)
    given = {"dtype": dtype, "device": bench.device, "generator": generator}
    inputs = [torch.randn(shape, **given).requires_grad_() for _ in range(3)]

    def back() -> tuple[Tensor, ...]:
        output = scaled_dot_product_attention(*inputs, is_causal=True)
        return torch.autograd.grad(output, inputs, torch.ones_like(output))

    seconds = bench.median_seconds(back, repeats=5, warm_up=2)
    first, *others = (back() for _ in range(TURNS))
    same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return {"seconds": seconds, "same_bits": same}
