"""70B and beyond: simulated runs beside their floors, and the driver's allocation at 560 linears.

A simulated run is the closed form of `--preset fast` at 0.8: the real schedules and the real
failure policy, on a clock that jumps by what each call computes, reads and writes at a GPU's rates
(`orchestrator/forecast/rates.json`). The floor is that of the FLOPs alone, with all GPUs at work
from the first moment to the last. No GPU is asked.
"""

import argparse
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from benchmarks.figures import print_table, say

from orchestrator.allocate import ALLOCATORS
from orchestrator.cluster.simulation import Simulated, simulate
from orchestrator.forecast.costs import Costs
from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import Machine, Rates, machine_of
from orchestrator.forecast.shapes import Shapes, from_config
from orchestrator.plan import Curve, Linear
from orchestrator.recipe import make_recipe

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
"""Llama 3's two large ones, and one with the shape of a dense model of a trillion parameters."""
SHARED = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
RUNS = (("70B", 1), ("70B", 8), ("70B", 64), ("405B", 64), ("405B", 1024), ("1T", 1024))
AIMS = {("70B", 8): 600.0, ("70B", 64): 120.0}
"""Seconds that we aim at."""
LOSS_HOURS = 1.0
"""Mean life of a node of eight GPUs, in the rows with losses: far worse than spot markets are."""
CLOSED_FORMS = ("uniform", "threshold", "svd-llm-v2", "d-rank", "mgaa")
LIMIT_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--runs", type=int, default=len(RUNS), help="the first so many")


def run(options: argparse.Namespace) -> dict[str, Any]:
    machine = machine_of(options.gpu)
    rows = [row for name, gpus in RUNS[: options.runs] for row in simulated(name, gpus, machine)]
    show(rows)
    allocations = [allocated(name) for name in CLOSED_FORMS]
    allocations.append(allocated("threshold", is_pivoted=True))
    print_table(
        [("allocation of 560 linears", "seconds", "asked")]
        + [(each["name"], f"{each['seconds']:.3f}", f"{LIMIT_SECONDS:g}") for each in allocations]
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of this process {peak / 1e9:.2f} GB")
    return {"gpu": options.gpu, "simulated": rows, "allocations": allocations, "peak_bytes": peak}


def shapes_of(name: str) -> Shapes:
    return from_config({**SHARED, **MODELS[name]}, name)


def simulated(name: str, gpus: int, machine: Machine) -> list[dict[str, Any]]:
    """One run at both rows of rates, and at the second with nodes that are lost."""
    shapes = shapes_of(name)
    recipe = make_recipe({"preset": "fast", "model": name, "out": "simulated", "keep": 0.8})
    costs = Costs(shapes, recipe)
    expected = forecast(
        shapes, recipe, Resources(workers=gpus, machine=machine, memory_bytes=None)
    ).seconds
    rows = []
    ways = [(rates, None) for rates in machine.rows] + [(machine.rows[-1], LOSS_HOURS)]
    for rates, loss_hours in ways:
        say(f"{name} on {gpus} GPUs, {rates.row}" + (", with losses" if loss_hours else ""))
        found = simulate(costs, rates, gpus, loss_hours=loss_hours)
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


def allocated(name: str, *, is_pivoted: bool = False) -> dict[str, Any]:
    """One allocation of a 70B model's linears, with curves to the full rank."""
    linears = [replace(each, pivoted=is_pivoted) for each in shapes_of("70B").linears]
    curves = {each.name: curve_of(each, number) for number, each in enumerate(linears)}
    sublayers = {each.sublayer: 0.9 for each in linears}
    allocate = ALLOCATORS[name]()
    start = time.perf_counter()
    allocate(linears, curves, 0.8, sublayers)
    label = f"{name}, pivoted" if is_pivoted else name
    return {"name": label, "seconds": time.perf_counter() - start, "linears": len(linears)}


def curve_of(linear: Linear, number: int) -> Curve:
    """Energies that fall by a power of the rank, another one for each linear."""
    ranks = np.arange(1, min(linear.out_features, linear.in_features) + 1, dtype=np.float64)
    energies = ranks ** -(1.2 + 0.4 * (number % 7) / 7)
    return Curve(name=linear.name, energies=energies, total=float(energies.sum()))
