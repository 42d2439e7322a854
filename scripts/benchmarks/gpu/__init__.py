"""Check of a machine with a GPU in at most eight minutes: correctness, repeatability, speed.

Needs torch and transformers, no Ray and no network (see benchmarks/README.md). Parts run in
sequence, the most important first, in a separate process; each prints a line at its end, and the
results file is updated. A part that fails, dies or takes far longer than expected does not stop the
others; a part without enough time is omitted.

--small runs the same code at tiny sizes, on a CPU too. --rates prints the row of a results file for
orchestrator/forecast/rates.json without any measurement.
"""

import argparse
import json
import platform
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.rates import device_row
from benchmarks.gpu.results import Results, summary
from benchmarks.gpu.supervisor import ROOT, read_environment, supervise

RESULTS = ROOT / "benchmarks" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="benchmarks/results/gpu-DEVICE-DATE.json by default",
    )
    names = list(PARTS)
    says = f"parts to run, of {', '.join(names)}"
    parser.add_argument(
        "--only", metavar="PART", choices=names, nargs="+", default=names, help=says
    )
    parser.add_argument("--seconds", type=float, default=480, help="time of all parts together")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--commit", help="commit of the code, if git is not available")
    parser.add_argument("--rates", metavar="FILE", type=Path, help="only print rates from results")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.rates is not None:
        row = device_row(Results.read(options.rates))
        print(json.dumps(row, indent=2))
        return row
    deadline = time.monotonic() + options.seconds
    environment = read_environment()
    if options.commit is not None:
        environment["commit"] = options.commit
    if environment["cuda_device"] is None and not options.small:
        raise SystemExit(
            f"torch {environment['torch']} (CUDA {environment['cuda']}) sees no CUDA device, "
            f"driver {environment['driver']}; give --small to try the code on a CPU"
        )
    out = options.out or default_out(environment, is_small=options.small)
    results = Results(out, environment, is_small=options.small)
    print(f"{environment['device']}, torch {environment['torch']}; results go to {out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        supervise(results, [each for each in PARTS if each in options.only], Path(work), deadline)
    results = Results.read(out)
    print(summary(results))
    return results.content


def default_out(environment: dict[str, Any], *, is_small: bool) -> Path:
    device = environment["cuda_device"] or platform.machine()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    size = "small-" if is_small else ""
    return RESULTS / f"gpu-{size}{slug}-{environment['date'].replace(':', '')}.json"
