"""`Gram.update` with a sequence's rows: its time, and its error against float64."""

from functools import partial
from typing import Any

import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from torch import Tensor

from orchestrator.linalg.gram import Gram

ERROR = 1e-5
"""Largest error of an entry, relative to the largest one on the diagonal."""
TRIANGLE = 1.2
"""FLOPs a token and squared channel (see `linalg.gram`)."""


def measure(bench: Bench) -> PartResult:
    tokens, rows = bench.size(2048, 128), []
    for channels in bench.size((8192, 28_672), (64, 96)):
        bench.free()
        generator = torch.Generator(bench.device).manual_seed(channels)
        given = {"device": bench.device, "dtype": torch.float64, "generator": generator}
        exact_TI = torch.randn(tokens, channels, **given)
        for dtype in (torch.bfloat16, torch.float32):
            rows.append(updated(bench, exact_TI.to(dtype)))
    first = rows[0]
    line = (
        f"{first['channels']} channels of {first['dtype']}: {1e3 * first['seconds']:.3g} ms for "
        f"{tokens} tokens, {first['rate'] / 1e12:.3g} TFLOP/s, error {first['error']:.1e}"
    )
    return PartResult(line, rows, tuple(check for row in rows for check in checks_of(row)))


def updated(bench: Bench, rows_TI: Tensor) -> dict[str, Any]:
    tokens, channels = rows_TI.shape
    work = partial(Gram(channels, bench.device).update, rows_TI)
    seconds = bench.median_seconds(work, repeats=5, warm_up=2)
    del work
    found_II, again_II = (Gram(channels, bench.device).update(rows_TI).matrix() for _ in range(2))
    same_bits = torch.equal(found_II, again_II)
    del again_II
    wide_TI = rows_TI.double()
    exact_II, double_seconds = bench.timed(lambda: wide_TI.T @ wide_TI)
    scale = float(exact_II.diagonal().max())
    return {
        "channels": channels,
        "dtype": str(rows_TI.dtype).removeprefix("torch."),
        "seconds": seconds,
        "rate": TRIANGLE * tokens * channels**2 / seconds,
        "float64_seconds": double_seconds,
        "error": float(exact_II.sub_(found_II).abs_().max()) / scale,
        "same_bits": same_bits,
    }


def checks_of(row: dict[str, Any]) -> list[Check]:
    name = f"{row['channels']} channels, {row['dtype']}"
    return [
        Check(f"same bits, {name}", row["same_bits"]),
        Check(f"error, {name}", row["error"], ERROR),
    ]
