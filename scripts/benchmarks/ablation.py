"""Contribution of each part of `--preset best`: closed form, storage, refinement, training.

The small protocol of `methods`: perplexity on WikiText-2's test text and on C4, at each size. G is
the fraction of the gap in log-perplexity between uniform svd-llm and the dense model that a row
closes. A seed determines the labels of the curvature and the order of the training sequences;
uniform svd-llm uses no random numbers, so it has one seed. Each row is a file: existing rows are
not measured again.
"""

import argparse
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.figures import print_table, say
from benchmarks.common.local_ray import local_ray
from benchmarks.methods import Row, compress, facts, once, perplexities

from orchestrator.recipe.presets import PRESETS

UNIFORM, FAST, BEST = "uniform", "fast", "best"
TWO_SIDED = {"method": "two-sided"}
TRAINED = {stage: {stage: PRESETS[BEST]["options"][stage]} for stage in ("refinement", "training")}
STEPS = sum(PRESETS[BEST]["options"][stage]["epochs"] for stage in TRAINED)
"""Epochs of `best`, in which each weight takes as many gradient steps per batch in total."""
ROWS: Mapping[str, Row] = {
    UNIFORM: {"method": "svd-llm"},
    "two-sided norm, uniform ranks": TWO_SIDED | {"allocation": "uniform"},
    "+ threshold": TWO_SIDED | {"options": {"threshold": {"dense": "break_even"}}},
    "+ hull": TWO_SIDED,
    FAST: PRESETS[FAST],
    "fast + compensation": PRESETS[FAST]
    | {"compensate": "anchored", "options": {"compensation": {"basis": "kept"}}},
    "fast + refinement": PRESETS[FAST] | {"refine": "blocks", "options": TRAINED["refinement"]},
    "fast + training": PRESETS[FAST] | {"train": "all", "options": TRAINED["training"]},
    BEST: PRESETS[BEST],
    "AA-SVD, equal steps": {
        "method": "svd-llm",
        "refine": "in_order",
        "options": {"refinement": {"epochs": STEPS}},
    },
}
SEEDED = (FAST, BEST)
TEXTS = ("wikitext2", "c4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help="holds wikitext2/ and c4/"
    )
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/ablation"))
    parser.add_argument("--keep", metavar="FRACTION", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="of fast and of best")


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    with local_ray():
        path = options.work / "dense.json"
        dense = once(path, lambda: perplexities(options, options.model))
        for keep in options.keep:
            for name in options.only:
                for seed in range(options.seeds if name in SEEDED else 1):
                    label = f"{name}-{keep:g}-{seed}".replace(" ", "-")
                    path = options.work / f"{label}.json"
                    rows[label] = once(
                        path,
                        lambda n=name, k=keep, s=seed, at=label: row(
                            options, n, k, seed=s, label=at
                        ),
                    )
    show(options, dense, rows)
    return {"dense": dense, "rows": rows}


def row(
    options: argparse.Namespace, name: str, keep: float, *, seed: int, label: str
) -> dict[str, Any]:
    say(label)
    result = compress(options, ROWS[name], label, keep=keep, seed=seed)
    return {"name": name, "keep": keep} | perplexities(options, result.out) | facts(result)


def show(
    options: argparse.Namespace, dense: Mapping[str, float], rows: Mapping[str, Mapping[str, Any]]
) -> None:
    print_table([("dense", *(f"{dense[text]:.2f}" for text in TEXTS))])
    for keep in options.keep:
        at_keep = [each for each in rows.values() if each["keep"] == keep]
        uniform = next((each for each in at_keep if each["name"] == UNIFORM), None)
        table = [(f"{keep:g} kept", "WikiText-2", "G", "C4", "G", "seconds")]
        for name in options.only:
            same = [each for each in at_keep if each["name"] == name]
            cells = []
            for text in TEXTS:
                cells.append(spread([each[text] for each in same], "{:.2f}"))
                closed = [gain(each[text], dense[text], uniform and uniform[text]) for each in same]
                cells.append(spread(closed, "{:.1%}"))
            seconds = statistics.median(sum(each["stages"].values()) for each in same)
            table.append((name, *cells, f"{seconds:.0f}"))
        print_table(table)


def gain(perplexity: float, dense: float, uniform: float | None) -> float:
    """Fraction of the gap in log-perplexity that is closed; nan without the row of uniform."""
    if uniform is None:
        return math.nan
    return math.log(uniform / perplexity) / math.log(uniform / dense)


def spread(values: list[float], form: str) -> str:
    """Format the mean, and the range of several values."""
    if len(values) == 1:
        return form.format(values[0])
    half = (max(values) - min(values)) / 2
    return f"{form.format(statistics.fmean(values))} ± {form.format(half)}"
