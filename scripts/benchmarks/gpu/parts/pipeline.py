"""Six recipes from start to end: twice on the device, and once on the CPU in another process.

    python -m benchmarks.gpu.parts.pipeline DIRECTORY [--small]

runs all of them on the CPU, as the other process does.
"""

import gc
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pipeline as helpers
import torch
from benchmarks.common.clock import timed
from benchmarks.gpu.bench import Bench, Check, PartResult
from safetensors.torch import load_file
from torch import Tensor

import orchestrator.hf  # noqa: F401 # compressed checkpoints are loaded by plain transformers
from orchestrator.plan.result import REPORT_FILE

CPU = torch.device("cpu")
BEST = {
    **{"compensate": "anchored", "refine": "swept", "train": "all"},
    # few steps of every kind: the quality of the result does not matter
    "options": {"refinement": {"epochs": 2}, "training": {"epochs": 1}},
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "svd-llm": {"method": "svd-llm"},
    "fast": {"method": "two-sided", "storage": "pivoted"},
    "best": {"method": "two-sided", "storage": "pivoted", **BEST},
    "cap": {"method": "cap"},
    "entries": {"method": "two-sided-sparse"},
    "asvd": {"method": "asvd"},
}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "best": {
        "options": {
            "refinement": {"epochs": 1, "batches": 1},
            "training": {"epochs": 1, "batches": 1},
        }
    },
    "cap": {"options": {"cap": {"iterations": 1, "samples": 2, "buckets": 16}}},
    "entries": {"options": {"two-sided-sparse": {"densities": "0 0.3", "steps": 2}}},
    "asvd": {"options": {"strs": {"grid": "0.4 0.9", "windows": 1}}},
}
"""Fields of the recipes with --small: fewer steps and trials."""
WITHOUT_LABELS = ("svd-llm", "cap", "asvd")
"""Recipes without labels. Others draw them by the device's generator, so a CPU's differ."""
APART = {True: 0.005, False: 0.03}
"""Largest relative difference of perplexity from the CPU's; True: no labels are drawn."""
ERRORS_APART = 1e-4
"""Largest difference of a linear's `activation_error`: Grams are accurate to 1e-5."""
SAMPLES = 3
"""Sequences of calibration; one of them is held out where blocks are refined."""
CPU_SECONDS = 200


def measure(bench: Bench) -> PartResult:
    directory = bench.work / "pipeline"
    helpers.write_llama(directory / "model", blocks=bench.size(3, 2), hidden=32)
    helpers.write_text(directory / "text.txt")
    on_cpu = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu.parts.pipeline",
            str(directory),
            *bench.size((), ("--small",)),
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    rows, recipes = {}, recipes_of(bench.results.is_small)
    try:
        for name, fields in recipes.items():
            turns = [perform(directory, name, turn, fields) for turn in ("first", "second")]
            rows[name] = {"seconds": turns}
        if on_cpu.wait(CPU_SECONDS):
            raise RuntimeError(f"the process on the CPU ended with status {on_cpu.returncode}")
    finally:
        on_cpu.kill()
    errors = {
        f"{name}, {turn}": file.read_text(encoding="utf-8")
        for name in RECIPES
        for turn in ("first", "second", "cpu")
        if (file := failure_file(directory, name, turn)).exists()
    }
    checks = []
    for name, row in rows.items():
        failed = [key for key in errors if key.startswith(f"{name},")]
        checks.append(Check(f"{name} runs", not failed))
        if not failed:
            row |= compare(directory, name)
            checks += judged(name, row, is_cpu=not bench.is_cuda)
            bench.say(f"{name}: {in_words(row)}")
    ran = sum("perplexities" in row for row in rows.values())
    line = (
        f"{ran} of {len(rows)} recipes ran, {sum(map(same_bits, rows.values()))} with the same bits"
    )
    return PartResult(line, {"recipes": rows, "errors": errors}, tuple(checks))


def same_bits(row: Mapping[str, Any]) -> bool:
    return row.get("other_bits_in") == []


def in_words(row: Mapping[str, Any]) -> str:
    ours, theirs = row["perplexities"]
    bits = "same bits" if same_bits(row) else f"OTHER bits in {len(row['other_bits_in'])} tensors"
    return f"{bits}, perplexity {ours:.3f}, on the CPU {theirs:.3f}"


def recipes_of(is_small: bool) -> dict[str, Mapping[str, Any]]:
    """The recipes, with fewer steps and trials if small."""
    return {
        name: {**row, **SMALL.get(name, {})} if is_small else row for name, row in RECIPES.items()
    }


def perform(directory: Path, name: str, turn: str, fields: Mapping[str, Any]) -> float | None:
    """Seconds of a run; if it fails, None and a file with the traceback."""
    model, text = directory / "model", directory / "text.txt"
    try:
        out = directory / f"{name}-{turn}"
        return timed(lambda: helpers.run(model, out, text, samples=SAMPLES, **fields), CPU)[1]
    except Exception:
        failure_file(directory, name, turn).write_text(traceback.format_exc(), encoding="utf-8")
        return None


def failure_file(directory: Path, name: str, turn: str) -> Path:
    return directory / f"{name}-{turn}.failure"


def compare(directory: Path, name: str) -> dict[str, Any]:
    """Compare the two runs on the device, and the first of them with the CPU's."""
    first, second, cpu = (directory / f"{name}-{turn}" for turn in ("first", "second", "cpu"))
    ours, again, theirs = tensors_of(first), tensors_of(second), tensors_of(cpu)
    errors, expected = errors_of(first), errors_of(cpu)
    return {
        "other_bits_in": sorted(
            key for key in ours.keys() | again.keys() if not is_same(ours.get(key), again.get(key))
        ),
        "same_shapes_as_cpu": shapes_of(ours) == shapes_of(theirs),
        "errors_apart": max(abs(errors[key] - expected[key]) for key in errors),
        "perplexities": [perplexity(first, directory), perplexity(cpu, directory)],
    }


def judged(name: str, row: Mapping[str, Any], *, is_cpu: bool) -> list[Check]:
    is_closed = name in WITHOUT_LABELS
    ours, theirs = row["perplexities"]
    checks = [
        Check(f"{name} repeats its bits", same_bits(row)),
        Check(f"{name}, perplexity apart from the CPU's", abs(ours / theirs - 1), APART[is_closed]),
    ]
    # rounding may change a choice of `cap` and `asvd`, so only one recipe must have the CPU's sizes
    if is_cpu or name == "svd-llm":
        checks += [
            Check(f"{name}, shapes are the CPU's", row["same_shapes_as_cpu"]),
            Check(f"{name}, activation errors apart", row["errors_apart"], ERRORS_APART),
        ]
    return checks


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    return found


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def errors_of(checkpoint: Path) -> dict[str, float]:
    """Relative loss of output energy of each linear, from the report."""
    report = json.loads((checkpoint / REPORT_FILE).read_text(encoding="utf-8"))
    linears = report["linears"].items()
    return {name: float(entry["activation_error"]) for name, entry in linears}


@torch.no_grad()
def perplexity(checkpoint: Path, directory: Path) -> float:
    """Perplexity of a written checkpoint on the text's start, by transformers on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (directory / "text.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"][:60]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens_BT = torch.tensor([ids])
    return math.exp(float(model(tokens_BT, labels=tokens_BT).loss))


if __name__ == "__main__":
    for recipe, given in recipes_of("--small" in sys.argv).items():
        perform(Path(sys.argv[1]), recipe, "cpu", given)
        gc.collect()
        gc.freeze()  # what was imported; workers collect after every stage
