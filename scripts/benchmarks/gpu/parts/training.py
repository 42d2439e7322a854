"""Steps of refining and training one compressed block: time, and repeatability of bits."""

import zlib
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import compressed as helpers
import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from benchmarks.gpu.parts.model import one_block, sequences
from torch import Tensor

from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.shards.shard import Shard
from orchestrator.models.training.refine import Refinement
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.models.training.train import Training
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.plan import Assignment
from orchestrator.randomness import Randomness

FORMS = ("low_rank", "pivoted")
KEEP = 0.7
"""Fraction of the break-even rank."""
FLOPS = 6.0
"""FLOPs a trained value and token: forward, and backward to inputs and values."""


def measure(bench: Bench) -> PartResult:
    tokens, number = bench.size((2048, 6), (64, 4))
    dense = LazyModel.open(one_block(bench), dtype=torch.bfloat16, device=bench.device)
    inputs, rows = sequences(number, tokens), {}
    with dense.shard(range(1)) as shard:
        targets = [shard.forward(chunk) for chunk in inputs]
    for form in FORMS:
        compressed = random_block(dense, form, bench.device)
        turns = [refined(bench, compressed, inputs, targets) for _ in range(2)]
        row = rows[form] = dict(turns[1])
        row["same_bits"] = turns[0]["digest"] == turns[1]["digest"]
        row["rate"] = FLOPS * row["values"] * tokens * number / row["epoch_seconds"]
        row |= trained(bench, compressed, inputs[0])
        bench.say(
            f"{form}: epoch of {number} sequences {row['epoch_seconds']:.3g} s, "
            f"{row['rate'] / 1e12:.3g} TFLOP/s; training step {row['step_seconds']:.3g} s"
        )
    checks = []
    for form, row in rows.items():
        checks.append(Check(f"{form}, an epoch repeats its bits", row["same_bits"]))
        checks.append(Check(f"{form}, training steps repeat theirs", row["steps_same_bits"]))
    same = sum(check.holds for check in checks)
    return PartResult(f"{same} of {len(checks)} repeated with the same bits", rows, tuple(checks))


def random_block(dense: LazyModel, form: str, device: torch.device) -> LazyModel:
    """The model with random tensors of a form in place of its linears, in float32."""
    survey = dense.survey()
    assignments = {
        linear.name: Assignment(form=form, rank=int(KEEP * LOW_RANK.break_even(linear)))
        for linear in survey.linears
    }

    def read(spec: TensorSpec) -> Tensor:
        if spec.part == "copy":
            return dense.weights.read(spec.source)
        generator = torch.Generator(device).manual_seed(zlib.crc32(spec.name.encode()))
        if spec.part == "order":
            return torch.randperm(spec.shape[0], generator=generator, device=device)
        return 0.02 * torch.randn(spec.shape, generator=generator, device=device)

    plan = helpers.plan_of(survey, assignments)
    return dense.planned(plan, read, output_dtype=torch.float32, dtype=torch.float32)


def refined(
    bench: Bench, compressed: LazyModel, inputs: list[Chunk], targets: list[Chunk]
) -> dict[str, Any]:
    """The first epoch of a refinement."""
    bench.free()
    with compressed.shard(range(1)) as shard:
        values = sum(parameter.numel() for parameter in shard.own_parameters().values())
        with Refinement(
            shard, inputs, targets, options=RefineOptions(epochs=2), randomness=Randomness(0)
        ) as refinement:
            start = refinement.start
            epoch, seconds = bench.timed(refinement.epoch)
            peak = bench.peak_bytes()
            return {
                "values": values,
                "epoch_seconds": seconds,
                "digest": refinement.digest(),
                "held_out": [start, epoch.held_out],
                "peak_bytes": peak,
                "bytes_a_value": None if peak is None else peak / values,
            }


def trained(bench: Bench, compressed: LazyModel, chunk: Chunk) -> dict[str, Any]:
    """Steps of a training, twice from the same start."""
    results, seconds = [], 0.0
    for _ in range(2):
        bench.free()
        with compressed.shard(range(1)) as shard:
            training = Training(
                shard, [0], list(compressed.disk_names), mode="all", weight_decay=0.0
            )
            gradient = gradient_of(shard, chunk, bench.device)
            work = partial(step, shard, training, chunk, gradient, numbers=count(1))
            seconds = bench.median_seconds(work)
            results.append(training.tensors(0))
            del work, training
    first, second = results
    same = all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    return {"step_seconds": seconds, "steps_same_bits": same, "step_peak_bytes": bench.peak_bytes()}


def step(
    shard: Shard, training: Training, chunk: Chunk, gradient: Tensor, *, numbers: Iterator[int]
) -> None:
    shard.backward(chunk, [gradient])
    training.collect()
    training.norms()
    training.update(next(numbers), 1.0, 1e-5)


def gradient_of(shard: Shard, chunk: Chunk, device: torch.device) -> Tensor:
    """Random gradient by the logits: the one block is the model's last."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (*chunk.tokens.shape, shard.config.vocab_size)
    return 1e-4 * torch.randn(shape, generator=generator, device=device)
