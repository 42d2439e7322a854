"""Peak memory of an actor at 1, 2, 5 and 10 shards of a synthetic model of over 4 GB.

Every run is a whole `orchestrator compress` of the same bfloat16 model with one actor on Ray, in a
separate process. The linears of attention are targeted, so that decompositions take minutes and not
hours; all weights of a shard are loaded, and the Grams are those of the targeted linears. Memory is
anonymous plus shared, sampled every 20 ms, above the baseline after the workers started and
imported their packages.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.common.figures import print_table, say
from benchmarks.common.flops import gram_channels
from benchmarks.common.synthetic import block_shapes, config_of, write_model, write_text
from benchmarks.common.watching import PeakWatcher
from transformers import LlamaConfig

from orchestrator.methods import METHODS
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.cut import cut_blocks

TARGET = "*.self_attn.*"
SAMPLES = 4
SEQUENCE_LENGTH = 128
BYTES_A_GRAM_ENTRY = 12
"""Bytes per Gram entry: a float64 sum and a float32 one (see `Gram`)."""
ALLOWED = 0.1, 500_000_000
"""Allowed excess of the peak over weights and Grams: a fraction of them, and bytes independent of
shards (modules imported late, one decomposition at a time, activations, free memory not returned).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run; bytes."""

    shards: int
    blocks: int
    """Number of blocks in the largest shard."""
    weights: int
    """Weights of the largest shard."""
    grams: int
    """Grams of the largest shard."""
    peak: int
    """Peak of the actor, above its baseline."""
    driver_peak: int
    """Peak of the driver, above its baseline."""
    seconds: float

    @property
    def is_bounded(self) -> bool:
        expected = self.weights + self.grams
        return self.peak <= expected * (1 + ALLOWED[0]) + ALLOWED[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/memory"))
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=1024, help="channels, a multiple of 512")
    parser.add_argument("--intermediate", type=int, default=13312)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-files", action="store_true", help="leave model and results there")


def run(options: argparse.Namespace) -> dict[str, Any]:
    config = config_of(
        blocks=options.blocks, hidden=options.hidden, intermediate=options.intermediate
    )
    model = options.work / "model"
    shutil.rmtree(options.work, ignore_errors=True)
    try:
        write_model(model, config)
        total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        say(f"the model has {total / 1e9:.2f} GB in {options.blocks} blocks")
        text = write_text(options.work / "text.txt", SAMPLES * SEQUENCE_LENGTH)
        rows = [measure(model, config, text, shards=n, options=options) for n in options.shards]
    finally:
        if not options.keep_files:
            shutil.rmtree(options.work, ignore_errors=True)
    show(rows, total)
    return {
        "model_bytes": total,
        "rows": [asdict(row) | {"is_bounded": row.is_bounded} for row in rows],
    }


def measure(
    model: Path, config: LlamaConfig, text: Path, *, shards: int, options: argparse.Namespace
) -> Row:
    say(f"{shards} shards")
    out = options.work / f"out-{shards}"
    start = time.monotonic()
    recipe = {
        "method": "svd-llm",
        "keep": 0.5,
        "target": TARGET,
        "calibration": text,
        "samples": SAMPLES,
        "sequence_length": SEQUENCE_LENGTH,
        "workers": 1,
        "threads": options.threads,
        "shards": shards,
    }
    peak, driver_peak = compress(model, out, recipe)
    seconds = time.monotonic() - start
    if not options.keep_files:
        shutil.rmtree(out)
        shutil.rmtree(f"{out}.run")
    largest = max(len(blocks) for blocks in cut_blocks(options.blocks, shards))
    weights, grams = bytes_a_block(model, config)
    return Row(
        shards=shards,
        blocks=largest,
        weights=weights * largest,
        grams=grams * largest,
        peak=peak,
        driver_peak=driver_peak,
        seconds=seconds,
    )


def compress(model: Path, out: Path, recipe: Mapping[str, Any]) -> tuple[int, int]:
    """Run the command; returns the peaks of its actor and of itself, above their baselines."""
    command = [sys.executable, "-m", "orchestrator", "compress", str(model), str(out)]
    given = {**recipe, "progress": "json"}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    actors: list[int] = []
    with (
        PeakWatcher() as watcher,
        subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as process,
    ):
        assert process.stderr is not None
        said = ""
        for said in process.stderr:
            event = json.loads(said) if said.startswith("{") else {}
            if event.get("event") == "workers":
                actors += [worker["pid"] for worker in event["workers"]]
                for pid in [process.pid, *actors]:
                    watcher.follow(pid)
        if process.wait() != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said}")
        return max(map(watcher.above_baseline, actors)), watcher.above_baseline(process.pid)


def bytes_a_block(model: Path, config: LlamaConfig) -> tuple[int, int]:
    """Bytes of a block: weights in bfloat16, and Grams of the targeted linears."""
    values = sum(math.prod(shape) for shape in block_shapes(config).values())
    linears = LazyModel.open(model).survey().of_block(0)
    chosen = [linear for linear in linears if fnmatchcase(linear.name, TARGET)]
    channels = gram_channels(chosen, METHODS["svd-llm"].side)
    return 2 * values, sum(BYTES_A_GRAM_ENTRY * n * n for n in channels)


def show(rows: Sequence[Row], total: int) -> None:
    print(f"model {total / 1e9:.2f} GB; MB:")
    table = [
        (
            *("shards", "blocks a shard", "weights", "Grams", "sum", "actor's peak"),
            *("peak less sum", "driver's peak", "seconds", "bounded by its shard"),
        )
    ]
    for row in rows:
        expected = row.weights + row.grams
        sizes = [row.weights, row.grams, expected, row.peak, row.peak - expected, row.driver_peak]
        table.append(
            (
                f"{row.shards}",
                f"{row.blocks}",
                *(f"{size / 1e6:.0f}" for size in sizes),
                f"{row.seconds:.0f}",
                "yes" if row.is_bounded else "no",
            )
        )
    print_table(table)
