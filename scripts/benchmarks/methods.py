"""Every method at every size: perplexity on two texts, two zero-shot accuracies, time and size.

The small protocol: float32, calibrated on the first 32 windows of 512 tokens of WikiText-2's
training text; perplexity on 32 windows of 512 tokens of WikiText-2's test text (every 17th) and of
C4's first thousand documents (every 29th); accuracy on evenly spaced samples of ARC-Easy and
LAMBADA. All rows share one run directory, so methods with the same decompositions share calibration
and decompositions. Each row is a file: existing rows are not measured again.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import print_table, say
from benchmarks.common.local_ray import local_ray
from benchmarks.quality import (
    SAMPLES,
    SEQUENCE_LENGTH,
    STRIDE,
    write_calibration_text,
    write_evaluation_text,
)
from benchmarks.zero_shot import ARC_FILE, LAMBADA_FILE, arc_easy, lambada, sample

from orchestrator import api
from orchestrator.cli.lines import Lines
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.plan.cache_size import cache_bytes
from orchestrator.plan.result import Result
from orchestrator.recipe.presets import PRESETS
from orchestrator.recipe.recipe import Recipe

C4_FILE = "c4/c4_train_first1k.jsonl"
C4_STRIDE = 29
Row = Mapping[str, Any]
"""Fields of a recipe."""

CACHED: Row = {"target": ("*.k_proj", "*.v_proj"), "rank_multiple": "auto", "keep_cache": None}
"""Rows whose sizes are fractions of the cache of keys and values, which alone are cut."""
HELD_OUT_FILE = "wikitext2/wiki.valid.raw"
SHORT = {"rate": 0.05, "growth": 1.07, "growth_every": 1, "batch": 1, "every": 10}
"""A learning of as many windows as the path's, a hundredth of the default's."""

SOCO = {"rate": 0.1, "steps": 60, "batch": 2, "every": 20}
"""A course of as many windows as the path's."""

PATH = {"batch": 2}
"""A path of half as many sequences as the default's, some 120 windows."""


def searched(**options: Any) -> dict[str, Any]:
    """Fields of a search for the plan, whose text `compress` adds."""
    return {"allocation": "search", "options": {"search": {"sequences": 8, **options}}}


ROWS: Mapping[str, Row] = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "svd-llm": {"method": "svd-llm"},
    "svd-llm (refit)": {"method": "svd-llm", "options": {"svd-llm": {"refit": "always"}}},
    "svd-llm-v2": {"method": "svd-llm-v2"},
    "basis-sharing": {"method": "basis-sharing"},
    "d-rank (paper)": {
        "method": "d-rank",
        "options": {"d-rank": {"setting": "paper", "refit": "above_forty"}},
    },
    "d-rank": {"method": "d-rank"},
    "mgaa": {"method": "mgaa"},
    "bolaco": {"method": "bolaco"},
    "bolaco (pooled)": {"method": "bolaco", "options": {"bolaco": {"covariance": "pooled"}}},
    "lpaf": {"method": "lpaf"},
    "lpaf (inputs)": {"method": "lpaf", "options": {"lpaf": {"norm": "inputs"}}},
    "lpaf (trained)": {"method": "lpaf", "train": "all"},
    "lpaf (mixed)": {"method": "lpaf", "train": "all", "options": {"training": {"mixed": 0.5}}},
    "wanda": {"method": "wanda"},
    "cap": {"method": "cap"},
    "two-sided": {"method": "two-sided"},
    "two-sided (pivoted)": PRESETS["fast"],
    "two-sided (path)": {**PRESETS["fast"], "allocation": "path", "options": {"path": PATH}},
    "two-sided (path, no gains)": {
        **PRESETS["fast"],
        "allocation": "path",
        "options": {"path": {**PATH, "gains": "no"}},
    },
    "two-sided (learned)": {
        "method": "two-sided",
        "allocation": "learned",
        "options": {"learned": SHORT},
    },
    "svd (learned, paper)": {
        "method": "svd",
        "allocation": "learned",
        "options": {"learned": {**SHORT, "tail": "full", "penalty_by": "count", "adapters": 32}},
    },
    "two-sided (soco)": {
        "method": "two-sided",
        "allocation": "soco",
        "options": {"soco": SOCO},
    },
    "two-sided (soco to 0.4)": {
        "method": "two-sided",
        "allocation": "soco",
        "options": {"soco": {**SOCO, "target": 0.4}},
    },
    "two-sided (soco, two budgets)": {
        "method": "two-sided",
        "allocation": "soco",
        "options": {"soco": {**SOCO, "budgets": "0.6 0.8"}},
    },
    "best": PRESETS["best"],
    "two-sided-sparse": {"method": "two-sided-sparse"},
    "lorc (cache)": {"method": "svd", "allocation": "lorc", **CACHED},
    "two-sided (cache)": {"method": "two-sided", **CACHED},
    "grasp": {"method": "grasp"},
    "grasp (all blocks)": {"method": "grasp", "allocation": "threshold"},
    "grasp (signed)": {"method": "grasp", "options": {"grasp": {"aggregate": "signed"}}},
    "grasp (published)": {
        "method": "grasp",
        "options": {"grasp": {"aggregate": "signed", "labels": "after_next"}},
    },
    "bolaco (search)": {"method": "bolaco", **searched()},
    "svd-llm (search)": {"method": "svd-llm", **searched()},
    "two-sided (search)": {"method": "two-sided", **searched()},
    "two-sided (search by tpe)": {"method": "two-sided", **searched(sampler="tpe")},
    "two-sided (search around)": {
        "method": "two-sided",
        **searched(around="threshold", depths=4, low=0.05),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help="holds wikitext2/, c4/, arc/, ..."
    )
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/methods"))
    parser.add_argument("--keep", metavar="FRACTION", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument(
        "--questions", type=int, default=100, help="of ARC-Easy and of LAMBADA; 0 for none"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    if any(ROWS[name].get("allocation") == "search" for name in options.only):
        (options.data / HELD_OUT_FILE).stat()  # rows before the searches take hours
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    with local_ray():
        rows["dense"] = once(options.work / "dense.json", lambda: measure(options, options.model))
        for name in options.only:
            for keep in options.keep:
                label = f"{name} {keep:g}"
                path = options.work / f"{label.replace(' ', '-')}.json"
                rows[label] = once(path, lambda n=name, k=keep: row(options, n, k))
    show(rows)
    if options.questions:
        print(f"ARC-Easy and LAMBADA: {options.questions} evenly spaced items of each")
    return {"rows": rows, "questions": options.questions}


def once(path: Path, work: Any) -> dict[str, Any]:
    """Return the content of the file, or else the result of the work, which is written to it."""
    if not path.exists():
        value = work()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.rename(path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def row(options: argparse.Namespace, name: str, keep: float) -> dict[str, Any]:
    say(f"{name} at {keep:g}")
    size = {"keep_cache" if "keep_cache" in ROWS[name] else "keep": keep}
    result = compress(options, ROWS[name], f"{name.replace(' ', '-')}-{keep:g}", **size)
    return measure(options, result.out) | facts(result)


def compress(options: argparse.Namespace, given: Row, name: str, **fields: Any) -> Result:
    """Compress with the small protocol and these fields, in the run directory shared by all
    rows."""
    if given.get("allocation") == "search":
        # neither the calibration text nor that of the perplexities
        held_out = options.work / "held-out.txt"
        held_out.write_bytes((options.data / HELD_OUT_FILE).read_bytes())
        given = {
            **given,
            "options": {"search": {**given["options"]["search"], "text": str(held_out)}},
        }
    recipe = Recipe(
        model=str(options.model),
        out=str(options.work / "out" / name),
        calibration=str(write_calibration_text(options.data / "wikitext2", options.work)),
        samples=SAMPLES,
        sequence_length=SEQUENCE_LENGTH,
        dtype="float32",
        threads=1,
        run_dir=str(options.work / "run"),
        **{**given, **fields},
    )
    return api.compress(recipe, on_event=Lines(sys.stderr))


def facts(result: Result) -> dict[str, Any]:
    """Facts of a compression from its report."""
    return {
        "stages": result.report["timings"]["seconds"],
        "kept": result.report["kept"]["linears"],
        "values": result.report["values"]["stored"],
        "cache": cache_bytes(result.report),
    }


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found = {"bytes": size} | perplexities(options, model)
    return found | accuracies(options, model) if options.questions else found


def perplexities(options: argparse.Namespace, model: Path) -> dict[str, float]:
    """Perplexities on both texts."""
    texts = {
        "wikitext2": (write_evaluation_text(options.data / "wikitext2", options.work), STRIDE),
        "c4": (options.data / C4_FILE, C4_STRIDE),
    }
    found = {}
    for name, (text, stride) in texts.items():
        report = api.evaluate(
            model,
            text=str(text),
            samples=SAMPLES,
            sequence_length=SEQUENCE_LENGTH,
            stride=stride,
            dtype="float32",
            threads=1,
            run_dir=options.work / "evaluation" / f"{model.name}-{name}",
            on_event=Lines(sys.stderr),
        )
        found[name] = report["models"]["model"]["perplexity"]
    return found


def accuracies(options: argparse.Namespace, directory: Path) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, tokenizer = api.load(directory, dtype=torch.float32), load_tokenizer(directory)
        return {
            "arc_easy": arc_easy(
                model, tokenizer, sample(options.data / ARC_FILE, options.questions)
            ),
            "lambada": lambada(
                model, tokenizer, sample(options.data / LAMBADA_FILE, options.questions)
            ),
        }
    finally:
        torch.set_num_threads(threads)


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    heads = ("", "kept", "MB", "WikiText-2", "C4", "ARC-Easy", "LAMBADA", "seconds")
    table = [heads]
    for name, row in rows.items():
        table.append(
            (
                name,
                f"{row['kept']:.4f}" if "kept" in row else "",
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['wikitext2']:.2f}",
                f"{row['c4']:.2f}",
                f"{row['arc_easy']:.0%}" if "arc_easy" in row else "",
                f"{row['lambada']:.0%}" if "lambada" in row else "",
                f"{sum(row['stages'].values()):.0f}" if "stages" in row else "",
            )
        )
    print_table(table)
