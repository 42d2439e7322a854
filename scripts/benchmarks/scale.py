"""Cost of a 70B model: each part of the work over its lower bound, and simulated whole runs.

simulated       whole runs of `--preset fast` at 0.8 for 70B, 405B and 1T: the real
                schedules and the real failure policy, on a clock that jumps by what each call
                computes, reads and writes at a GPU's rates (`orchestrator/forecast/rates.json`).
                The floor is that of the FLOPs alone, all GPUs at work from first to last. No GPU
                is asked
simulator       the same simulator against real runs of a small model on this machine
allocation      the driver's: 560 linears with full curves, 560,000 with curves at 128 ranks
decompositions  one 8192 x 8192 and one 8192 x 28672 linear against the published way and against
                their FLOPs; `--size 4096` is an eighth of the work
calibration     forward and Grams of two blocks against their FLOPs at the rate of the GEMMs
actors          two one-thread actors against two bare processes with the same numerics
growth          4 to 32 blocks: seconds a block, peak of an actor
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.calibration import measure_calibration
from benchmarks.common.figures import print_figures, print_table, say
from benchmarks.common.local_ray import local_ray
from benchmarks.common.synthetic import config_of, write_model, write_text
from benchmarks.decompositions import measure_linears, measure_ways, show_linears, show_ways
from benchmarks.runs import SEQUENCE_LENGTH, measure_growth, measure_simulator
from benchmarks.worker_groups import actors_against_bare

from orchestrator.allocate import ALLOCATORS
from orchestrator.allocate.sampled_curve import MOST, sample_curve
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.forecast import costs_of, forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import Machine, Rates, machine_of
from orchestrator.forecast.shapes import Shapes, from_config
from orchestrator.forecast.simulate import Simulated, simulate
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import LOW_RANK, PIVOTED, Form
from orchestrator.plan.linear import Linear
from orchestrator.recipe.recipe import make_recipe
from orchestrator.resolve import resolve

MODELS: Mapping[str, Mapping[str, Any]] = {
    "70B": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    },
    "405B": {
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
    },
    "1T": {
        "hidden_size": 20480,
        "num_hidden_layers": 160,
        "intermediate_size": 87040,
        "num_attention_heads": 160,
    },
}
"""Two large models of Llama 3, and one with the shape of a dense model of a trillion parameters."""
SHARED = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
RUNS = (("70B", 1), ("70B", 8), ("70B", 64), ("405B", 64), ("405B", 1024), ("1T", 1024))
AIMS = {("70B", 8): 600.0, ("70B", 64): 120.0}
"""Target times in seconds."""
LOSS_HOURS = 1.0
"""Mean life of a node of eight GPUs in the rows with losses: far shorter than on spot markets."""
CLOSED_FORMS = ("uniform", "threshold", "svd-llm-v2", "d-rank", "mgaa")
LIMIT_SECONDS = 1.0
LINEARS, EXPERTS = 560, 1000
"""Linears of a 70B model, and the factor for models with many experts."""
CHUNKS = 48
"""Chunks of the run with two actors: the second one waits for one chunk, a negligible part."""
KNOTS_SECONDS, KNOTS_BYTES = 60.0, 4e9
PARTS = (
    *("simulated", "simulator", "allocation", "decompositions"),
    *("calibration", "actors", "growth"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="the first so many simulated")
    parser.add_argument("--size", type=int, default=8192, help="channels of the large linears")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of their numerics")
    parser.add_argument("--repeats", type=int, default=3, help="of what takes seconds")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/scale"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    parts: Mapping[str, Callable[[argparse.Namespace], Any]] = {
        "simulated": run_simulated,
        "simulator": lambda options: measure_simulator(options.work, options.repeats),
        "allocation": run_allocations,
        "decompositions": run_decompositions,
        "calibration": run_calibration,
        "actors": run_actors,
        "growth": lambda options: measure_growth(options.work),
    }
    figures: dict[str, Any] = {"load": os.getloadavg()}
    try:
        for name in options.only:
            print(f"\n{name}", flush=True)
            figures[name] = parts[name](options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    return figures


def run_simulated(options: argparse.Namespace) -> list[dict[str, Any]]:
    machine = machine_of(options.gpu)
    rows = [row for name, gpus in RUNS[: options.runs] for row in simulated(name, gpus, machine)]
    show(rows)
    return rows


def run_decompositions(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    linears = measure_linears(options.size, options.size * 7 // 2)
    show_linears(linears)
    ways = measure_ways(options.size // 4, options.repeats)
    show_ways(ways)
    return {"linears": linears, "ways": ways}


def run_calibration(options: argparse.Namespace) -> dict[str, Any]:
    figures, more = measure_calibration(some_model(options), 5 * options.repeats, first_block=4)
    print_figures(figures)
    return {"figures": [each.to_json() for each in figures], **more}


def run_actors(options: argparse.Namespace) -> list[dict[str, Any]]:
    text = write_text(options.work / "text.txt", CHUNKS * SEQUENCE_LENGTH)
    with local_ray():
        figures = actors_against_bare(
            *(some_model(options), text, options.work),
            samples=CHUNKS,
            sequence_length=SEQUENCE_LENGTH,
            repeats=options.repeats,
        )
    print_figures(figures)
    return [each.to_json() for each in figures]


def some_model(options: argparse.Namespace) -> Path:
    """Make a Llama with eight blocks of 1024 channels, written once."""
    model: Path = options.work / "eight-blocks"
    if not model.exists():
        write_model(model, config_of(blocks=8, hidden=1024, intermediate=2816))
    return model


def shapes_of(name: str) -> Shapes:
    return from_config({**SHARED, **MODELS[name]}, name)


def simulated(name: str, gpus: int, machine: Machine) -> list[dict[str, Any]]:
    """Simulate one run with both sets of rates, and with the second also with lost nodes."""
    shapes = shapes_of(name)
    recipe = make_recipe({"preset": "fast", "model": name, "out": "simulated", "keep": 0.8})
    costs = costs_of(shapes, resolve(recipe))
    expected = forecast(
        shapes, recipe, Resources(workers=gpus, machine=machine, memory_bytes=None)
    ).seconds
    rows = []
    ways = [(rates, None) for rates in machine.rows] + [(machine.rows[-1], LOSS_HOURS)]
    for rates, loss_hours in ways:
        say(f"{name} on {gpus} GPUs, {rates.row}" + (", with losses" if loss_hours else ""))
        found = simulate(shapes, recipe, rates, gpus, loss_hours=loss_hours)
        rows.append(
            {
                "model": name,
                "gpus": gpus,
                "rates": rates.row,
                "losses": loss_hours is not None,
                "seconds": sum(stage.seconds for stage in found.values()),
                "forecast": expected[rates.row] - rates.start,
                "floor": floor(costs, rates, gpus),
                "stages": {stage: asdict(each) for stage, each in found.items()},
                "utilisation": _together(found, "busy_seconds")
                / _together(found, "worker_seconds"),
                "bytes_moved": _together(found, "bytes_moved"),
                "lost_nodes": _together(found, "lost_nodes"),
                "repeated": _together(found, "repeated"),
                "redone": _together(found, "redone"),
            }
        )
    return rows


def _together(found: Mapping[str, Simulated], name: str) -> float:
    return float(sum(getattr(stage, name) for stage in found.values()))


def floor(costs: Costs, rates: Rates, gpus: int) -> float:
    """Seconds of the FLOPs alone, evenly over all GPUs."""
    return costs.compute().seconds(rates) / gpus


def show(rows: list[dict[str, Any]]) -> None:
    table = [
        (
            *("model", "GPUs", "rates", "seconds", "floor", "ratio", "plan says", "aim"),
            *("busy", "moved", "nodes lost", "calls repeated", "units redone"),
        )
    ]
    for row in rows:
        aim = AIMS.get((row["model"], row["gpus"]))
        table.append(
            (
                row["model"],
                str(row["gpus"]),
                row["rates"] + (", losses" if row["losses"] else ""),
                f"{row['seconds']:.0f}",
                f"{row['floor']:.0f}",
                f"{row['seconds'] / row['floor']:.2f}",
                "" if row["losses"] else f"{row['forecast']:.0f}",
                "" if aim is None else f"{aim:.0f}",
                f"{row['utilisation']:.2f}",
                f"{row['bytes_moved'] / 1e9:.0f} GB",
                f"{row['lost_nodes']:.0f}",
                f"{row['repeated']:.0f}",
                f"{row['redone']:.0f}",
            )
        )
    print_table(table)


def run_allocations(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [allocated(name) for name in CLOSED_FORMS]
    rows.append(allocated("threshold", PIVOTED))
    rows.append(allocated_samples())
    table = [("allocation", "linears", "seconds", "asked", "peak of the driver", "asked")]
    for row in rows:
        many = row["linears"] > LINEARS
        table.append(
            (
                row["name"],
                f"{row['linears']:,}",
                f"{row['seconds']:.2f}",
                f"{KNOTS_SECONDS if many else LIMIT_SECONDS:g}",
                f"{row['peak_bytes'] / 1e9:.2f} GB" if many else "",
                f"{KNOTS_BYTES / 1e9:g} GB" if many else "",
            )
        )
    print_table(table)
    print(f"error bound with {MOST} samples per curve: {rows[-1]['error']:.1e} of the whole energy")
    return rows


def allocated(name: str, form: Form = LOW_RANK) -> dict[str, Any]:
    """Measure one allocation for the linears of a 70B model, with full curves."""
    linears = shapes_of("70B").linears
    curves = {each.name: curve_of(each, number) for number, each in enumerate(linears)}
    sublayers = {each.sublayer: 0.9 for each in linears}
    allocate = ALLOCATORS[name]()
    start = time.perf_counter()
    allocate(linears, curves, 0.8, sublayers, form=form)
    label = f"{name}, pivoted" if form is PIVOTED else name
    return {"name": label, "seconds": time.perf_counter() - start, "linears": len(linears)}


def allocated_samples() -> dict[str, Any]:
    """Measure in a separate process, to measure the memory of a driver."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_allocate_samples)


def _allocate_samples() -> dict[str, Any]:
    """Run `threshold` over the linears of many small experts, with `MOST` samples per curve."""
    linears, curves = [], {}
    for number in range(EXPERTS * LINEARS):
        name = f"model.layers.{number // 5600}.mlp.experts.{number % 5600}"
        linear = Linear(
            name=name,
            block=number // 5600,
            role="mlp.experts",
            site=name,
            out_features=768,
            in_features=2048,
            has_bias=False,
        )
        linears.append(linear)
        curves[name] = sample_curve(curve_of(linear, number), LOW_RANK.break_even(linear) - 1)
    start = time.perf_counter()
    ALLOCATORS["threshold"]()(linears, curves, 0.8, {})  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    whole = sum(each.total for each in curves.values())
    return {
        "name": "threshold, sampled curves",
        "linears": len(linears),
        "seconds": seconds,
        "error": sum(each.error * each.total for each in curves.values()) / whole,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def curve_of(linear: Linear, number: int) -> Curve:
    """Make energies that fall by a power of the rank, different for each linear."""
    ranks = np.arange(1, min(linear.out_features, linear.in_features) + 1, dtype=np.float64)
    energies = ranks ** -(1.2 + 0.4 * (number % 7) / 7)
    return Curve(name=linear.name, energies=energies, total=float(energies.sum()))
