"""The course of `scripts/benchmark serving`: checkpoints, both engines, the table."""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.figures import Figure, compare, print_table, say
from benchmarks.serving import in_transformers, in_vllm
from benchmarks.serving.checkpoints import make_all, synthetic, variants

ROOT = Path(__file__).resolve().parents[3]
TARGETED = "width-2048"
TARGETS = {"prefill": {"0.8": 1.15, "0.6": 1.45}, "decode": {"0.8": 1.1, "0.6": 1.35}}
"""Least speeds of this model over the dense one, by kept fraction."""

Times = Mapping[str, list[float]]
"""Seconds of every turn, by checkpoint."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for; prints a table of ratios."""
    begun, figures, rows = os.getloadavg(), [], []
    for model in options.models:
        work = options.work / model
        say(f"checkpoints of {model}")
        dense = synthetic(work / "dense") if model == TARGETED else options.smollm2
        checkpoints = make_all(dense, work)
        for engine in options.engines:
            say(f"{model} in {engine}")
            for phase, times in run_in(engine, checkpoints, options).items():
                speeds = compared(f"{model}, {engine}", phase, times, targeted=model == TARGETED)
                figures += speeds
                rows.append(row(f"{model}, {engine}, {phase}", times["dense"], speeds))
    print_table([("CPU ms of dense, speed over it", "dense", *variants()), *rows])
    missed = [figure.name for figure in figures if figure.met is False]
    print(f"< missed: {'; '.join(missed)}" if missed else "every target of these is met")
    loads = [tuple(round(load, 2) for load in each) for each in (begun, os.getloadavg())]
    print(f"load of the machine over 1, 5, 15 minutes: {loads[0]} at the start, {loads[1]} now")
    return {"figures": [each.to_json() for each in figures], "loads": loads}


def run_in(
    engine: str, checkpoints: Mapping[str, Path], options: argparse.Namespace
) -> dict[str, Times]:
    """Measure checkpoints in an engine by phase; vLLM in a process of its own environment."""
    if engine == "transformers":
        return in_transformers.measure(checkpoints, options.turns)
    if not options.vllm.exists():
        raise SystemExit(
            f"--vllm: {options.vllm} does not exist; scripts/test_vllm makes it, or give another "
            "interpreter"
        )
    job, out = options.work / "job.json", options.work / "seconds.json"
    directories = {name: str(path.absolute()) for name, path in checkpoints.items()}
    asked = {"checkpoints": directories, "turns": options.turns, "out": str(out)}
    job.write_text(json.dumps(asked))
    # the package of this tree, wherever the environment has it from
    paths = os.pathsep.join(str(ROOT / each) for each in ("scripts", "plugins/vllm"))
    environment = {**os.environ, "PYTHONPATH": paths}
    log = options.work / "vllm.log"
    with log.open("w") as file:
        command = [options.vllm, in_vllm.__file__, job]
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM ended with {done.returncode}; the end of {log}:\n{tail(log)}")
    return json.loads(out.read_text())


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def compared(name: str, phase: str, times: Times, *, targeted: bool) -> list[Figure]:
    """Return the speeds of the compressed checkpoints over the dense one, in their order."""
    least = TARGETS[phase.partition(" ")[0]]
    return [
        compare(
            f"{name}, {phase}, {variant}",
            times["dense"],
            times[variant],
            unit="s",
            target=least[variant.rpartition("-")[2]] if targeted else None,
            at_least=True,
        )
        for variant in variants()
    ]


def row(name: str, dense: list[float], speeds: list[Figure]) -> list[str]:
    """Return a row of the table; `<` stands by a speed below its target."""
    cells = [f"{each.ratio:.2f}{'<' if each.met is False else ''}" for each in speeds]
    return [name, f"{1000 * statistics.median(dense):.0f}", *cells]
