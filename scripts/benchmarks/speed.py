"""Ratios of one run, everything timed in turns: Ray, the store, the numerics, the arithmetic.

actors       two one-thread actors against two bare processes with the same numerics on half the
             work each: speed of calibration and decomposition
ray          one actor against --executor local: time of the whole job once the workers are up
calibration  forward and Grams of two blocks against their FLOPs at the rate of the GEMMs
numerics     all linears of a block against the published way
"""

import argparse
import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from benchmarks import numerics
from benchmarks.calibration import measure_calibration
from benchmarks.common.figures import Figure, print_figures, print_table, say
from benchmarks.common.local_ray import local_ray
from benchmarks.quality import CALIBRATION_FILE, write_calibration_text
from benchmarks.worker_groups import actors_against_bare, ray_against_local

PARTS = ("actors", "ray", "calibration", "numerics")
NUMERICS_TARGET = 0.5
NUMERICS_LINE = re.compile(r"block numerics, (\w+): (\d+) ms, ratio ([\d.]+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help=f"holds {CALIBRATION_FILE}"
    )
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/speed"))
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--samples", type=int, default=16, help="sequences; the part ray: a fourth")
    parser.add_argument(
        "--sequence-length", metavar="TOKENS", type=int, default=2048, help="of actors and ray"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns; the others: five times that")


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    text = write_calibration_text(options.data, options.work)
    figures: list[Figure] = []
    more: dict[str, Any] = {}
    begun = os.getloadavg()
    if "calibration" in options.only:
        say("calibration against its FLOPs")
        found, more["calibration"] = measure_calibration(options.model, 5 * options.repeats)
        figures += found
    if "numerics" in options.only:
        say("numerics of a block")
        figures.append(measure_numerics(options.model, text, 5 * options.repeats))
    if {"actors", "ray"} & {*options.only}:
        figures += measure_worker_groups(options, text)
    print_figures(figures)
    if "calibration" in more:
        show_calibration(more["calibration"])
    loads = [tuple(round(load, 2) for load in loads) for loads in (begun, os.getloadavg())]
    print(f"load of the machine over 1, 5, 15 minutes: {loads[0]} at the start, {loads[1]} now")
    return {"figures": [each.to_json() for each in figures], "loads": loads, **more}


def measure_worker_groups(options: argparse.Namespace, text: Path) -> list[Figure]:
    figures = []
    with local_ray():
        for part, measure, samples in [
            ("actors", actors_against_bare, options.samples),
            ("ray", ray_against_local, max(1, options.samples // 4)),
        ]:
            if part in options.only:
                figures += measure(
                    *(options.model, text, options.work),
                    samples=samples,
                    sequence_length=options.sequence_length,
                    repeats=options.repeats,
                )
    return figures


def measure_numerics(model: Path, text: Path, repeats: int) -> Figure:
    """Run `numerics.py`; returns its ratio as a figure."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        numerics.main(["--model", str(model), "--text", str(text), "--repeats", str(repeats)])
    print(printed.getvalue())
    found = {name: (ms, ratio) for name, ms, ratio in NUMERICS_LINE.findall(printed.getvalue())}
    return Figure(
        name="numerics of a block against the published way",
        measured=float(found["ours"][0]),
        reference=float(found["published"][0]),
        unit="ms",
        ratio=float(found["ours"][1]),
        target=NUMERICS_TARGET,
    )


def show_calibration(found: dict[str, Any]) -> None:
    print(f"rate of the GEMMs {found['gemm_gflops']:.0f} GFLOP/s; parts of a calibration's time:")
    print_table([(kind, f"{part:.1%}") for kind, part in found["parts_of_the_time"].items()])
