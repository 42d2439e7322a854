"""Whole job on two blocks with the shapes of Llama-70B: memory compared with the plan.

The checkpoint is made here: hidden 8192, MLP 28672, 8 key-value heads, random bfloat16 weights,
about 3.5 GB. `orchestrator compress` runs on Ray with one actor; its peak, and that of the driver,
are anonymous plus shared memory above the baseline after the workers started and imported their
packages. The forecast of `orchestrator plan` for the same recipe is printed beside it. By default
there are as many tokens as a Gram has channels, so that no direction is undetermined.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.common.figures import print_table, say
from benchmarks.common.synthetic import config_of, write_model, write_text
from benchmarks.memory import compress

from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Forecast, Resources
from orchestrator.forecast.rates import Machine
from orchestrator.forecast.shapes import read_shapes
from orchestrator.recipe.recipe import make_recipe

SEQUENCE_LENGTH = 512
WITHIN = 0.15
DRIVER_LIMIT = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/large"))
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=28672)
    parser.add_argument("--samples", type=int, help=f"sequences of {SEQUENCE_LENGTH} tokens")
    parser.add_argument("--method", default="svd-llm")
    parser.add_argument("--storage", default="plain")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--target", default="*", help="linears, as `compress` takes them")
    parser.add_argument("--threads", type=int, default=2)


def run(options: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(options.work, ignore_errors=True)
    try:
        return measure(options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, out = options.work / "model", options.work / "out"
    write_model(
        model, config_of(blocks=2, hidden=options.hidden, intermediate=options.intermediate)
    )
    samples = options.samples or options.hidden // SEQUENCE_LENGTH
    text = write_text(options.work / "text.txt", samples * SEQUENCE_LENGTH)
    recipe = {
        "keep": 0.8,
        "method": options.method,
        "storage": options.storage,
        "calibration": str(text),
        "samples": samples,
        "sequence_length": SEQUENCE_LENGTH,
        "workers": 1,
        "threads": options.threads,
        "shards": options.shards,
        "target": options.target,
    }
    planned = plan(model, recipe)
    said = planned.peak
    say(f"the plan: {said.device.total / 1e9:.2f} GB in {said.name}, {parts(planned)}")
    start = time.monotonic()
    peak, driver = compress(model, out, recipe)
    figures = {
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "planned_bytes": said.device.total,
        "parts": dict(said.device.parts),
        "peak_bytes": peak,
        "ratio": said.device.total / peak,
        "is_within": abs(said.device.total / peak - 1) <= WITHIN,
        "driver_bytes": driver,
        "driver_is_small": driver < DRIVER_LIMIT,
        "seconds": time.monotonic() - start,
    }
    show(figures)
    return figures


def plan(model: Path, fields: dict[str, Any]) -> Forecast:
    listed = {**fields, "target": (fields["target"],)}
    recipe = make_recipe({"model": str(model), "out": "out", **listed})
    resources = Resources(workers=1, machine=Machine("", None, ()), memory_bytes=None)
    return forecast(read_shapes(model), recipe, resources)


def parts(planned: Forecast) -> str:
    held = planned.peak.device.parts.items()
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in held)


def show(figures: dict[str, Any]) -> None:
    print_table(
        [
            ("model", "plan", "actor's peak", "plan / peak", "driver's peak", "seconds"),
            (
                *(f"{figures[n] / 1e9:.2f} GB" for n in ("model_bytes", "planned_bytes")),
                f"{figures['peak_bytes'] / 1e9:.2f} GB",
                f"{figures['ratio']:.3f}",
                f"{figures['driver_bytes'] / 1e9:.2f} GB",
                f"{figures['seconds']:.0f}",
            ),
        ]
    )
    print(f"asked: plan / peak within {1 - WITHIN:g} and {1 + WITHIN:g}, driver below 1 GB")
