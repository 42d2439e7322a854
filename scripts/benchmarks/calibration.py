"""One thread: forward and Grams of two blocks, against their FLOPs at the rate of the GEMMs.

The rate is that of the linears of the same blocks alone, called in the same order on inputs of the
same shapes, so that their weights come from the same caches. All times are CPU seconds of this
process, which are least affected by other programs; both sides are measured in turns.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import Figure, compare, in_turns
from benchmarks.common.flops import attention_flops, gram_channels, gram_flops, linear_flops
from torch import Tensor
from torch.nn.functional import linear as apply_linear
from torch.profiler import ProfilerActivity, profile

from orchestrator.device.malloc import keep_freed_memory
from orchestrator.methods import METHODS
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import dense_weight

METHOD = METHODS["svd-llm"]
TOKENS = 512
CHUNKS = 16
"""Chunks of a pass: 8192 tokens, after which each Gram is flushed once."""
TARGET = 1.15
OPERATIONS = {
    "linears": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "Grams": ("aten::addmm_",),
    "copies": ("aten::copy_", "aten::cat", "aten::index_select", "aten::clone"),
    "elementwise": (
        *("aten::mul", "aten::add", "aten::add_", "aten::silu", "aten::pow", "aten::sum"),
        *("aten::neg", "aten::div_", "aten::rsqrt", "aten::fill_", "aten::zero_"),
    ),
}


def measure_calibration(
    model: Path, repeats: int, first_block: int = 14
) -> tuple[list[Figure], dict[str, Any]]:
    """Measure the figure, with Grams counted in full and as triangles, and a profile of the
    time."""
    torch.set_num_threads(1)
    keep_freed_memory()
    lazy_model = LazyModel.open(model, dtype=torch.float32)
    chunk = chunk_before(lazy_model, first_block)
    with lazy_model.shard(range(first_block, first_block + 2)) as shard:
        calibration = Calibration(shard, shard.linears, METHOD.side)

        def calibrate() -> None:
            for _ in range(CHUNKS):
                calibration.forward(chunk)

        gemms = linears_alone(shard)
        times = in_turns(
            {"gemms": lambda: cpu_seconds(gemms), "calibration": lambda: cpu_seconds(calibrate)},
            repeats,
            warm_up=1,
        )
        parts = where_time_goes(calibrate)
        calibration.close()

    of_linears = linear_flops(shard.linears, TOKENS)
    forward = of_linears + attention_flops(lazy_model.config, TOKENS, len(shard.blocks))
    channels = gram_channels(shard.linears, METHOD.side)
    figures = []
    for says, triangle, target in [("n²", False, TARGET), ("one triangle", True, None)]:
        needed = forward + gram_flops(channels, TOKENS, triangle=triangle)
        figures.append(
            compare(
                f"calibration against its FLOPs, Grams as {says}",
                [seconds / CHUNKS * 1e3 for seconds in times["calibration"]],
                [seconds / CHUNKS * 1e3 * needed / of_linears for seconds in times["gemms"]],
                unit="ms a chunk",
                target=target,
            )
        )
    rate = of_linears * CHUNKS / sorted(times["gemms"])[len(times["gemms"]) // 2] / 1e9
    return figures, {"gemm_gflops": rate, "parts_of_the_time": parts}


def chunk_before(lazy_model: LazyModel, block: int) -> Chunk:
    """Return some tokens with their state at the input of this block."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lazy_model.config.vocab_size, (1, TOKENS), generator=generator)
    chunk = Chunk(0, tokens, torch.ones_like(tokens, dtype=torch.bool))
    with lazy_model.shard(range(block)) as shard:
        return shard.forward(chunk)


def linears_alone(shard: Shard) -> Callable[[], None]:
    """Return the products of a shard's linears for as many chunks as in a pass, in the order of
    calls."""
    weights = [dense_weight(shard.module(linear.name)) for linear in shard.linears]
    inputs: dict[int, Tensor] = {
        linear.in_features: torch.randn(1, TOKENS, linear.in_features) for linear in shard.linears
    }

    def run() -> None:
        for _ in range(CHUNKS):
            for weight_OI in weights:
                apply_linear(inputs[weight_OI.shape[1]], weight_OI)

    return run


def where_time_goes(work: Callable[[], None]) -> dict[str, float]:
    """Return fractions of the time by kind of operation; `rest` is Python, dispatch and the
    profiler."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    own = {each.key: each.self_cpu_time_total / 1e6 for each in profiler.key_averages()}
    parts = {kind: sum(own.get(name, 0.0) for name in names) for kind, names in OPERATIONS.items()}
    parts["rest"] = seconds - sum(parts.values())
    return {kind: round(part / seconds, 3) for kind, part in parts.items()}


def cpu_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
