"""The process that runs parts: `python -m benchmarks.gpu.worker RESULTS WORK DEADLINE PART ...`.

Ends with status 1 if the device no longer works after a failure: every later part would then fail
in this process, while another one may use the device.
"""

import gc
import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import Results


def main() -> None:
    path, work, deadline, *names = sys.argv[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, Path(work), Results.read(Path(path)), float(deadline))
    for name in names:
        entry = run_part(bench, name)
        if "error" in entry and not answers(device):
            print("the device no longer works in this process; another one continues", flush=True)
            sys.exit(1)


def run_part(bench: Bench, name: str) -> dict[str, Any]:
    """Run a part, or leaves it out if the time is short; its entry in the results."""
    results, part = bench.results, PARTS[name]
    left, needed = bench.seconds_left, 0.0 if bench.results.is_small else part.seconds
    if left < needed:
        entry: dict[str, Any] = {"left_out": f"{left:.0f} s left, {needed:.0f} s needed"}
        line = f"left out, {entry['left_out']}"
    else:
        results.begin(name)
        entry, line = attempt(bench, part.module)
    results.end(name, entry)
    print(f"{name}: {line} [{results.parts[name].get('seconds', 0):.0f} s]", flush=True)
    return entry


def attempt(bench: Bench, module: str) -> tuple[dict[str, Any], str]:
    """Entry of a part, with its results or its traceback, and its line of output."""
    try:
        bench.free()
        # as set by a worker of the pipeline
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        part = import_module(f"benchmarks.gpu.parts.{module}")
        # parts collect often, and a pass over the objects of torch takes a quarter of a second
        gc.freeze()
        found = part.measure(bench)
        checks = [check.to_json() for check in found.checks]
        entry = {"line": found.line, "figures": found.figures, "checks": checks}
        json.dumps(entry)
    except Exception as error:
        says = str(error)[:300]
        return {"error": traceback.format_exc()}, f"FAILED, {type(error).__name__}: {says}"
    return entry, found.line


def answers(device: torch.device) -> bool:
    """True if the device computes; after some CUDA errors a process cannot use it again."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


if __name__ == "__main__":
    main()
