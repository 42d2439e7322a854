"""Compression of a tiny LLaVA that is trained here on pictures of shapes with captions.

For each method, kept fraction and kind of calibration (pictures with captions, or captions alone):
perplexity of held-out captions given their pictures, fraction of greedy captions that are exact and
of their words, and the KL divergence from the dense model. Needs Pillow; minutes on one core.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import say
from benchmarks.images.pictures import DrawnScene, scenes, write_scenes
from benchmarks.images.tiny_llava import TinyLlava, make_llava, train

import orchestrator
from orchestrator import Recipe

METHODS = ("svd-llm", "mgaa", "two-sided")
"""The first gives all linears the same kept fraction."""
KEEPS = (0.8, 0.6, 0.5, 0.4)
CALIBRATIONS = ("images", "text")
LENGTH = 40
"""Tokens of a record: 16 of the picture, and a caption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", metavar="N", type=int, default=4000, help="of training")
    parser.add_argument("--pictures", metavar="N", type=int, default=128, help="of calibration")
    parser.add_argument("--held-out", metavar="N", type=int, default=128)
    parser.add_argument("--methods", metavar="NAME", nargs="+", default=METHODS)
    parser.add_argument("--keep", metavar="FRACTION", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=Path,
        help="keep all files there; a model in its folder dense is not trained again",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.directory or Path(temporary)
        return measure(root, options)


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train the model, compress it in every way, and evaluate all results."""
    made = scenes(options.seed, options.pictures + options.held_out)
    ours, held_out = made[: options.pictures], made[options.pictures :]
    texts = {
        "images": write_scenes(root / "calibration.jsonl", ours, with_images=True),
        "text": write_scenes(root / "captions.jsonl", ours, with_images=False),
    }
    test = write_scenes(root / "held-out.jsonl", held_out, with_images=True)
    dense, losses = root / "dense", list[float]()
    if dense.is_dir():
        tiny = TinyLlava.load(dense)
    else:
        tiny = make_llava(options.seed)
        say(f"training {sum(p.numel() for p in tiny.model.parameters()):,} parameters")
        losses = train(tiny, steps=options.steps, seed=options.seed + 1, avoid=held_out)
        tiny.save(dense)
    rows = [evaluated("dense", dense, dense, tiny, test=test, held_out=held_out)]
    print_row(rows[0])
    for calibration in CALIBRATIONS:
        for method in options.methods:
            run_dir = None
            for keep in options.keep:
                name = f"{method}-{calibration}-{keep}"
                if run_dir is None:
                    recipe = _recipe(
                        dense, root / name, text=texts[calibration], method=method, keep=keep
                    )
                    run_dir = orchestrator.compress(recipe).run_dir
                else:
                    orchestrator.retarget(
                        str(run_dir), str(root / name), keep=keep, executor="local"
                    )
                row = evaluated(method, root / name, dense, tiny, test=test, held_out=held_out)
                rows.append(row | {"calibration": calibration, "keep": keep})
                print_row(rows[-1])
    return {"training_losses": losses, "rows": rows}


def _recipe(dense: Path, out: Path, *, text: str, method: str, keep: float) -> Recipe:
    return Recipe(
        model=str(dense),
        out=str(out),
        calibration=text,
        layout="padded",
        sequence_length=LENGTH,
        samples=len(Path(text).read_text().splitlines()),
        method=method,
        keep=keep,
        executor="local",
    )


def evaluated(
    method: str,
    directory: Path,
    dense: Path,
    tiny: TinyLlava,
    *,
    test: str,
    held_out: Sequence[DrawnScene],
) -> dict[str, Any]:
    """Perplexity and KL by `orchestrator.evaluate`, exact captions by greedy generation."""
    found = orchestrator.evaluate(
        directory,
        against=str(dense),
        text=test,
        samples=len(held_out),
        sequence_length=LENGTH,
        layout="padded",
        executor="local",
        run_dir=f"{directory}.evaluation",
    )
    model = orchestrator.load(directory)
    captions = tiny.captions(model, held_out)
    pairs = [(a.split(), b.caption.split()) for a, b in zip(captions, held_out, strict=True)]
    words = [one == two for a, b in pairs for one, two in zip(a, b, strict=False)]
    return {
        "method": method,
        "perplexity": found["models"]["model"]["perplexity"],
        "kl": found["kl"],
        "exact": sum(a == b for a, b in pairs) / len(pairs),
        "words": sum(words) / len(words),
    }


def print_row(row: Mapping[str, Any]) -> None:
    figures = json.dumps({n: round(v, 5) if isinstance(v, float) else v for n, v in row.items()})
    print(figures, flush=True)
