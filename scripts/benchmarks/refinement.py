"""Independent refinement of blocks compared with refinement in order, and its cost over FLOPs.

Quality and time: the first blocks of a model are compressed, the others left dense, and refined
with equal numbers of steps, in order by one actor and in parallel by two, all with one thread;
measured are perplexity on held-out text and seconds of the stage. Cost: one epoch of one block over
its FLOPs at the rate of the products of the same factors, and from that ratio the time of a 70B
model on 64 GPUs, with the time of its FLOPs alone.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.calibration import TOKENS, cpu_seconds
from benchmarks.common.figures import Figure, compare, in_turns, print_figures, print_table, say
from benchmarks.common.flops import attention_flops
from benchmarks.common.local_ray import local_ray
from benchmarks.quality import SAMPLES, SEQUENCE_LENGTH, write_calibration_text
from torch import nn
from torch.nn.functional import linear as apply_linear

from orchestrator import api
from orchestrator.cli.lines import Lines
from orchestrator.device.malloc import keep_freed_memory
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.refine import Refinement
from orchestrator.models.training.refine_options import RefineOptions, split
from orchestrator.randomness import Randomness
from orchestrator.recipe.recipe import Recipe

WAYS = {"in_order": 1, "blocks": 2}
"""Number of actors by the value of `refine`."""
QUALITY, TIME = 1.02, 0.6
CHUNKS = 8

LLAMA_70B = {"blocks": 80, "values": 855_638_016, "hidden": 8192}
"""Values of the linears of a block; arXiv 2307.09288."""
KEPT, SEQUENCES, LENGTH, GPUS = 0.8, 256, 2048, 64
GPU_FLOPS = 495e12
"""Dense TF32 rate of an H100 SXM, from its data sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help="holds wiki.train and wiki.valid"
    )
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/refinement"))
    parser.add_argument("--blocks", metavar="N", type=int, default=8)
    parser.add_argument("--keep", metavar="FRACTION", type=float, default=0.6)
    parser.add_argument("--epochs", metavar="N", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", metavar="N", type=int, default=5)


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    with local_ray():
        rows = {
            f"{way} {epochs}": refine_some(options, way, epochs)
            for epochs in options.epochs
            for way in WAYS
        }
    table = [("refine, epochs", "perplexity", "seconds of the stage")]
    table += [(n, f"{r['perplexity']:.2f}", f"{r['seconds']:.0f}") for n, r in rows.items()]
    print_table(table)
    figures = []
    for epochs in options.epochs:
        apart, ordered = rows[f"blocks {epochs}"], rows[f"in_order {epochs}"]
        for what, unit, target in (("perplexity", "", QUALITY), ("seconds", "s", TIME)):
            name = f"blocks against in order, {epochs} epochs: {what}"
            figures.append(compare(name, [apart[what]], [ordered[what]], unit=unit, target=target))
    out = options.work / f"blocks-{options.epochs[0]}"
    floor = against_floor(out, options.repeats)
    print_figures([*figures, floor])
    print(at_70b(floor.ratio, max(options.epochs)))
    return {"rows": rows, "figures": [figure.to_json() for figure in (*figures, floor)]}


def refine_some(options: argparse.Namespace, way: str, epochs: int) -> dict[str, float]:
    """Compress and refine the first blocks; returns perplexity and the seconds of training."""
    say(f"{way}, {epochs} epochs")
    name = f"{way}-{epochs}"
    blocks = "|".join(map(str, range(options.blocks)))
    text = options.work / "held-out.txt"
    text.write_text((options.data / "wiki.valid.raw").read_text(encoding="utf-8"))
    recipe = Recipe.preset(
        "fast",
        model=str(options.model),
        out=str(options.work / name),
        keep=options.keep,
        target=(rf"re:.*\.layers\.({blocks})\..*",),
        refine=way,
        options={"refinement": {"epochs": epochs, "patience": epochs}},
        calibration=str(write_calibration_text(options.data, options.work)),
        samples=SAMPLES,
        sequence_length=SEQUENCE_LENGTH,
        dtype="float32",
        threads=1,
        workers=WAYS[way],
        run_dir=str(options.work / "run"),
    )
    result = api.compress(recipe, on_event=Lines(sys.stderr))
    report = api.evaluate(
        result.out,
        text=str(text),
        samples=SAMPLES,
        sequence_length=SEQUENCE_LENGTH,
        stride=15,
        dtype="float32",
        threads=1,
        run_dir=options.work / f"{name}.evaluation",
        on_event=Lines(sys.stderr),
    )
    stages = result.report["timings"]["seconds"]
    return {
        "perplexity": report["models"]["model"]["perplexity"],
        "seconds": stages["refine" if way == "blocks" else "walk"],
    }


def against_floor(compressed: Path, repeats: int) -> Figure:
    """Measure CPU seconds of one epoch of one block over its FLOPs at the rate of products."""
    torch.set_num_threads(1)
    keep_freed_memory()
    lazy_model = LazyModel.open(compressed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lazy_model.config.vocab_size, (1, TOKENS), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    chunks = [Chunk(index, tokens, mask) for index in range(CHUNKS)]
    options = RefineOptions(epochs=repeats + 1, patience=repeats + 1)
    training, held_out = split(CHUNKS, options.held_out)
    with lazy_model.shard(range(1)) as shard:
        targets = [shard.forward(chunk) for chunk in chunks]
        factors = [p for p in shard.own_parameters().values() if p.ndim == 2]
        products = products_alone(factors)
        with Refinement(
            shard, chunks, targets, options=options, randomness=Randomness(0)
        ) as refinement:
            work: dict[str, Callable[[], object]] = {
                "epoch": refinement.epoch,
                "products": products,
            }
            ways = {name: lambda do=do: cpu_seconds(do) for name, do in work.items()}
            times = in_turns(ways, repeats, warm_up=1)
    forward = 2 * TOKENS * sum(p.numel() for p in factors)
    attention = attention_flops(lazy_model.config, TOKENS, 1)
    passes = 3 * len(training) + len(held_out)
    needed = passes * (forward + attention) / (CHUNKS * forward)
    return compare(
        "an epoch of a block against its FLOPs at the products' rate",
        times["epoch"],
        [seconds * needed for seconds in times["products"]],
        unit="s",
    )


def products_alone(factors: list[nn.Parameter]) -> Callable[[], None]:
    """Return the products of a block with its factors, forward, for the chunks of an epoch."""
    weights = [factor.detach() for factor in factors]
    inputs = {n: torch.randn(1, TOKENS, n) for n in {weight.shape[1] for weight in weights}}

    def run() -> None:
        for _ in range(CHUNKS):
            for weight in weights:
                apply_linear(inputs[weight.shape[1]], weight)

    return run


def at_70b(ratio: float, epochs: int) -> str:
    """Describe seconds and bytes of the blocks of a 70B model refined independently, and the lower
    bound."""
    values = KEPT * LLAMA_70B["values"]
    tokens = SEQUENCES * LENGTH
    flops = epochs * LLAMA_70B["blocks"] * 6 * values * tokens
    floor = flops / GPUS / GPU_FLOPS
    waves = -(-LLAMA_70B["blocks"] // GPUS)
    seconds = waves * flops / LLAMA_70B["blocks"] / GPU_FLOPS * ratio
    states = 2 * tokens * LLAMA_70B["hidden"] * 2
    return (
        f"a 70B model on {GPUS} GPUs of {GPU_FLOPS / 1e12:.0f} TFLOP/s, {tokens:,} tokens, "
        f"{epochs} epochs: floor {floor:.0f} s; {seconds:.0f} s at this ratio to the FLOPs and in "
        f"{waves} waves; a GPU holds {20 * values / 1e9:.1f} GB of training state and "
        f"{states / 1e9:.1f} GB of a block's inputs and targets in bfloat16"
    )
