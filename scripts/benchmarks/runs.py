"""Real runs of small models: accuracy of the simulator, and growth with the number of blocks."""

import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common.figures import print_table, say
from benchmarks.common.local_ray import local_ray
from benchmarks.common.synthetic import config_of, write_model, write_text
from benchmarks.memory import compress

from orchestrator import api
from orchestrator.forecast.rates import Rates, read_machine
from orchestrator.forecast.shapes import read_shapes
from orchestrator.forecast.simulate import simulate
from orchestrator.recipe.recipe import Recipe, make_recipe
from orchestrator.stage_names import CALIBRATE

SEQUENCE_LENGTH = 512
SAMPLES = 16
WITHIN = 0.15
WORKERS = (1, 2)
BLOCKS = (4, 8, 16, 32)


def measure_simulator(work: Path, repeats: int) -> dict[str, Any]:
    """Compare real and simulated runs of a recipe on one and on two one-thread workers.

    Simulated twice: with the rates of `orchestrator measure`, as in a plan; and with the real times
    of one worker, which isolates the effect of the schedule.
    """
    model = work / "model"
    write_model(model, config_of(blocks=8, hidden=1024, intermediate=2816))
    text = write_text(work / "text.txt", SAMPLES * SEQUENCE_LENGTH)
    machine = read_machine(api.measure(work / "machine.json", dtype="float32", threads=1))
    real: dict[int, list[dict[str, float]]] = {workers: [] for workers in WORKERS}
    with local_ray():
        for repeat in range(repeats):
            for workers in WORKERS:
                say(f"{workers} workers, run {repeat + 1} of {repeats}")
                recipe = recipe_for(model, text, work / f"out-{workers}-{repeat}", workers)
                seconds = api.compress(recipe).report["timings"]["seconds"]
                real[workers].append(seconds)
    (rates,) = machine.rows
    simulations = {w: simulated(model, text, w, rates) for w in WORKERS}
    rows = []
    for stage in simulations[1]:
        found = {w: statistics.median(each[stage] for each in real[w]) for w in WORKERS}
        expected = {w: simulations[w][stage] for w in WORKERS}
        scaled = found[1] * expected[2] / expected[1]
        rows.append(
            {
                "stage": stage,
                "seconds": found,
                "simulated": expected,
                "from_one_worker": scaled,
                "ratio": scaled / found[2],
            }
        )
    show_simulator(rows)
    return {"rows": rows, "is_within": abs(rows[0]["ratio"] - 1) <= WITHIN}


def recipe_for(model: Path, text: Path, out: Path, workers: int) -> Recipe:
    fields = {
        "preset": "fast",
        "model": str(model),
        "out": str(out),
        "keep": 0.8,
        "calibration": str(text),
        "samples": SAMPLES,
        "sequence_length": SEQUENCE_LENGTH,
        "dtype": "float32",
        "workers": workers,
        "threads": 1,
    }
    return make_recipe(fields)


def simulated(model: Path, text: Path, workers: int, rates: Rates) -> dict[str, float]:
    """Simulated seconds by stage of the run, in order."""
    recipe, seconds = recipe_for(model, text, Path("out"), workers), Counter[str]()
    for phase in simulate(read_shapes(model), recipe, rates, workers).values():
        seconds[phase.stage] += phase.seconds
    return dict(seconds)


def show_simulator(rows: list[dict[str, Any]]) -> None:
    table = [
        (
            *("stage", "1 worker", "at measured rates", "ratio", "2 workers"),
            *("at measured rates", "ratio", "from one worker", "ratio"),
        )
    ]
    for row in rows:
        cells = [row["stage"]]
        for workers in WORKERS:
            took, expected = row["seconds"][workers], row["simulated"][workers]
            cells += [f"{took:.1f} s", f"{expected:.1f} s", f"{expected / took:.2f}"]
        table.append((*cells, f"{row['from_one_worker']:.1f} s", f"{row['ratio']:.2f}"))
    print_table(table)
    print(f"asked: the last ratio of calibrate within {1 - WITHIN:g} and {1 + WITHIN:g}")


def measure_growth(work: Path) -> dict[str, Any]:
    """Measure seconds per block and the actor's peak for models with growing numbers of blocks."""
    rows = []
    for blocks in BLOCKS:
        say(f"{blocks} blocks")
        model, out = work / f"model-{blocks}", work / f"grown-{blocks}"
        write_model(model, config_of(blocks=blocks, hidden=512, intermediate=1792))
        text = write_text(work / "text.txt", SAMPLES * SEQUENCE_LENGTH)
        recipe = {
            "preset": "fast",
            "keep": 0.8,
            "calibration": text,
            "samples": SAMPLES,
            "sequence_length": SEQUENCE_LENGTH,
            "workers": 1,
            "threads": 1,
        }
        start = time.monotonic()
        peak, driver = compress(model, out, recipe)
        whole = time.monotonic() - start
        report = json.loads((out / "orchestrator_report.json").read_text())
        seconds = report["timings"]["seconds"][CALIBRATE]
        rows.append(
            {
                "blocks": blocks,
                "seconds": seconds,
                "whole_seconds": whole,
                "peak_bytes": peak,
                "driver_bytes": driver,
            }
        )
    table = [("blocks", "calibrate", "a block", "actor's peak", "driver's peak")]
    for row in rows:
        table.append(
            (
                f"{row['blocks']}",
                f"{row['seconds']:.1f} s",
                f"{row['seconds'] / row['blocks']:.2f} s",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
                f"{row['driver_bytes'] / 1e6:.0f} MB",
            )
        )
    print_table(table)
    per_block = [row["seconds"] / row["blocks"] for row in rows]
    peaks = [row["peak_bytes"] for row in rows]
    figures = {
        "time": max(per_block) / min(per_block),
        "memory": max(peaks) / min(peaks),
        "rows": rows,
    }
    print(
        f"from {BLOCKS[0]} to {BLOCKS[-1]} blocks: seconds a block differ by a factor of "
        f"{figures['time']:.2f}, peaks by {figures['memory']:.2f}; floor 1"
    )
    return figures
