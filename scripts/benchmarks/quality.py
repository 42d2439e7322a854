"""Perplexity of SmolLM2-135M-Instruct, dense and compressed, on WikiText-2.

svd-llm with uniform ranks, float32, calibrated on the first 32 windows of 512 tokens of the
training text; scored on windows 0, 17, 34, ... (32 of them) of the test text. All sizes share one
run directory: the weights are decomposed once. A repeated call resumes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.figures import Figure, print_figures, print_table, say
from benchmarks.common.local_ray import local_ray

from orchestrator import api
from orchestrator.cli.lines import Lines
from orchestrator.recipe.recipe import Recipe

SEQUENCE_LENGTH = 512
SAMPLES = 32
STRIDE = 17
TOLERANCE = 0.01
CALIBRATION_FILE = "wiki.train.first1MB.raw"
EVALUATION_FILE = "wiki.test.raw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        required=True,
        help=f"holds {CALIBRATION_FILE} and {EVALUATION_FILE}",
    )
    parser.add_argument("--model", metavar="DIR", type=Path, required=True)
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path(".work/quality"))
    parser.add_argument("--keep", metavar="FRACTION", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument(
        "--reference",
        metavar="PERPLEXITY",
        type=float,
        nargs="+",
        default=[],
        help="of the dense model and of every size in order; prints the deviations",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    calibration = write_calibration_text(options.data, options.work)
    test = write_evaluation_text(options.data, options.work)
    found: dict[str, dict[str, Any]] = {}
    with local_ray():
        for keep in options.keep:
            out = compress(options.model, options.work, calibration, keep)
            say(f"evaluating {keep:g} kept")
            report = api.evaluate(
                out,
                against=options.model,
                text=str(test),
                samples=SAMPLES,
                sequence_length=SEQUENCE_LENGTH,
                stride=STRIDE,
                dtype="float32",
                threads=1,
                run_dir=options.work / f"evaluation-{keep:g}",
                on_event=Lines(sys.stderr),
            )
            found["dense"] = {"perplexity": report["models"]["against"]["perplexity"]}
            found[f"{keep:g} kept"] = {
                "perplexity": report["models"]["model"]["perplexity"],
                "kl": report["kl"],
                "top1_agreement": report["top1_agreement"],
            }
    show(found)
    figures = compare_with(options.reference, found)
    if figures:
        print_figures(figures)
    return {"sizes": found, "figures": [figure.to_json() for figure in figures]}


def write_calibration_text(data: Path, work: Path) -> Path:
    """Write the training text unchanged, except for undecodable bytes."""
    text = (data / CALIBRATION_FILE).read_text(encoding="utf-8", errors="ignore")
    path = work / "calibration.txt"
    path.write_text(text, encoding="utf-8")
    return path


def write_evaluation_text(data: Path, work: Path) -> Path:
    """Write the test text as used for published perplexities, joined from the data set rows.

    Rows are the lines of the file without the empty last one, each with its line end, or "" if
    blank; rows are separated by a blank line.
    """
    lines = (data / EVALUATION_FILE).read_text(encoding="utf-8").split("\n")
    path = work / "evaluation.txt"
    path.write_text(join_rows(lines if lines[-1] else lines[:-1]), encoding="utf-8")
    return path


def join_rows(lines: list[str]) -> str:
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def compress(model: Path, work: Path, calibration: Path, keep: float) -> Path:
    say(f"compressing to {keep:g}")
    recipe = Recipe(
        model=str(model),
        out=str(work / f"kept-{keep:g}"),
        method="svd-llm",
        keep=keep,
        calibration=str(calibration),
        samples=SAMPLES,
        sequence_length=SEQUENCE_LENGTH,
        dtype="float32",
        threads=1,
        run_dir=str(work / "run"),
    )
    return api.compress(recipe, on_event=Lines(sys.stderr)).out


def show(found: dict[str, dict[str, Any]]) -> None:
    rows = [("", "perplexity", "mean KL", "same first token")]
    for name, values in found.items():
        agreement = values.get("top1_agreement")
        rows.append(
            (
                name,
                f"{values['perplexity']:.2f}",
                f"{values['kl']:.4f}" if "kl" in values else "",
                f"{agreement:.1%}" if agreement is not None else "",
            )
        )
    print_table(rows)


def compare_with(reference: list[float], found: dict[str, dict[str, Any]]) -> list[Figure]:
    """Compare with a reference; the ratio is the relative deviation."""
    return [
        Figure(
            name=f"perplexity, {name}, deviation",
            measured=values["perplexity"],
            reference=expected,
            unit="",
            ratio=abs(values["perplexity"] / expected - 1),
            target=TOLERANCE,
        )
        for expected, (name, values) in zip(reference, found.items(), strict=False)
    ]
