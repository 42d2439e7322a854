"""One block of a 70B Llama through calibration and decomposition: time and memory over the plan."""

import statistics
from functools import partial
from typing import Any

import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from benchmarks.gpu.parts.model import one_block, sequences
from benchmarks.gpu.rates import computing_rates
from torch import Tensor

from orchestrator.forecast import memory
from orchestrator.forecast.shapes import Shapes, read_shapes
from orchestrator.forecast.statistics import decomposing_block, gathering, method_statistics
from orchestrator.methods import make_method
from orchestrator.methods.base import Method
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.statistics.orientation import dense_weight
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.linear import Linear

METHODS = ("svd-llm", "two-sided")
DTYPE = torch.bfloat16
DEVIATION = 1e-7
"""Largest error of a result's own measure of its loss, as a fraction of the total energy."""


def measure(bench: Bench) -> PartResult:
    model, written = bench.timed(lambda: one_block(bench))
    shapes, lazy_model = read_shapes(model), LazyModel.open(model, dtype=DTYPE, device=bench.device)
    tokens, count = bench.size((2048, 64), (64, 4))
    figures: dict[str, Any] = {"tokens": tokens, "sequences": count, "write_seconds": written}
    checks = []
    for name in METHODS:
        bench.free()
        shard, opened = bench.timed(lambda: lazy_model.shard(range(1)))
        with shard:
            row = pass_and_cut(bench, shard, make_method(name, {}), sequences(count, tokens))
        row["open_seconds"] = opened
        row["planned"] = planned(shapes, make_method(name, {}), bench, tokens=tokens, count=count)
        figures[name] = row
        checks += checks_of(name, row)
        bench.say(in_words(name, row))
    return PartResult(f"{count} sequences of {tokens} tokens", figures, tuple(checks))


def pass_and_cut(bench: Bench, shard: Shard, method: Method, chunks: list[Chunk]) -> dict[str, Any]:
    """Computations of a worker on a block: its statistics, then its factors, by linear."""
    backward = method.label_draws > 0
    if backward:
        shard.freeze()
    calibration = Calibration(
        shard,
        shard.linears,
        method.side,
        curvature=backward and method.gradient == "curvature",
        gradient=None if method.gradient == "curvature" else method.gradient,
        outputs=lambda _: method.output_curvature,
    )
    seconds, pack_seconds = [], None
    for chunk in chunks:
        if backward:
            gradient = random_gradient(shard, chunk, bench.device)
            seconds.append(bench.timed(partial(calibration.backward, chunk, [gradient]))[1])
        else:
            passed, spent = bench.timed(partial(calibration.forward, chunk))
            seconds.append(spent)
            pack_seconds = bench.timed(passed.pack)[1]
    row: dict[str, Any] = {
        "sequence_seconds": statistics.median(seconds),
        "calibrate_seconds": sum(seconds),
        "pack_seconds": pack_seconds,
        "calibrate_peak_bytes": bench.peak_bytes(),
    }
    # as in a worker, once all chunks have passed
    calibration.flush_writes()
    shard.free_ends()
    row["linears"] = {
        linear.role: cut(bench, shard, calibration, method, linear=linear)
        for linear in shard.linears
    }
    calibration.close()
    row["decompose_seconds"] = sum(each["seconds"] for each in row["linears"].values())
    row["peak_bytes"] = bench.peak_bytes()
    return row


def cut(
    bench: Bench, shard: Shard, calibration: Calibration, method: Method, *, linear: Linear
) -> dict[str, float]:
    """Decompose a linear and copies its factors to the host."""
    statistic = calibration.statistic(linear)
    calibration.forget([linear])
    weight_OI, rank = dense_weight(shard.module(linear.name)), max(LOW_RANK.break_even(linear), 1)
    result, seconds = bench.timed(partial(method.decompose, weight_OI, statistic, rank))
    stored = bench.timed(partial(stored_tensors, result.weight_OR, result.down_RI))[1]
    deviation = result.report["deviation"]
    return {"seconds": seconds, "to_host_seconds": stored, "deviation": deviation}


def random_gradient(shard: Shard, chunk: Chunk, device: torch.device) -> Tensor:
    """Random gradient by the logits: the one block is the model's last."""
    generator = torch.Generator(device).manual_seed(chunk.index)
    shape = (*chunk.tokens.shape, shard.config.vocab_size)
    return 1e-3 * torch.randn(shape, generator=generator, device=device, dtype=DTYPE)


def stored_tensors(weight_OR: Tensor, down_RI: Tensor) -> list[Tensor]:
    """Factors as a worker stores them: rows by rank, on the host."""
    return [each.to(DTYPE).contiguous().cpu() for each in (weight_OR.T, down_RI)]


def planned(
    shapes: Shapes, method: Method, bench: Bench, *, tokens: int, count: int
) -> dict[str, Any]:
    """Forecast of the same work: bytes of tensors, and seconds by each row of rates.

    Context and fragmentation are left out: the measured peak is that of the allocated tensors.
    """
    footprint = memory.calibration(
        shapes,
        method,
        1,
        tokens=tokens,
        sequences=count,
        itemsize=DTYPE.itemsize,
        pivoted=False,
        gpu=bench.is_cuda,
    )
    tensors = {n: size for n, size in footprint.parts.items() if n not in memory.HOST_PARTS}
    statistics, itemsize = method_statistics(shapes.heaviest, method), DTYPE.itemsize
    passing = gathering(shapes, statistics, tokens, itemsize).times(count)
    cutting = decomposing_block(shapes.heaviest, method, pivoted=False, itemsize=itemsize)
    seconds = {
        rates.row: {"calibrate": passing.seconds(rates), "decompose": cutting.seconds(rates)}
        for rates in computing_rates(bench.results)
    }
    return {"bytes": sum(tensors.values()), "parts": tensors, "seconds": seconds}


def checks_of(name: str, row: dict[str, Any]) -> list[Check]:
    checks = [
        Check(f"{name}, deviation of {role}", each["deviation"], DEVIATION)
        for role, each in row["linears"].items()
    ]
    if row["peak_bytes"] is not None:
        within = row["peak_bytes"] / row["planned"]["bytes"]
        checks.append(Check(f"{name}, peak over the plan", within, 1.0))
    return checks


def in_words(name: str, row: dict[str, Any]) -> str:
    plans = row["planned"]["seconds"].items()
    calibrated, cut = (
        ", ".join(f"{rates} {seconds[stage]:.3g}" for rates, seconds in plans) or "no rates known"
        for stage in ("calibrate", "decompose")
    )
    line = (
        f"{name}: calibrated in {row['calibrate_seconds']:.3g} s (plan: {calibrated}), "
        f"decomposed in {row['decompose_seconds']:.3g} s (plan: {cut})"
    )
    if row["peak_bytes"] is not None:
        planned_bytes = row["planned"]["bytes"] / 1e9
        line += f", peak {row['peak_bytes'] / 1e9:.1f} GB (plan: {planned_bytes:.1f})"
    return line
