"""Compression of the experts alone of a tiny Qwen3-MoE that is trained here on the bytes of a text.

For every row and kept fraction: rise of the mean loss on a held-out text, in nats, KL divergence
from the dense model, and the bytes of the experts in the file. Rows of one kept fraction store as
many values, so they are compared at equal bytes. Minutes on one core.
"""

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import print_table, say
from benchmarks.experts.rows import ROWS
from benchmarks.experts.tiny_moe import LENGTH, make_moe, save, train
from safetensors.torch import load_file

import orchestrator
from orchestrator import Recipe

EXPERTS = "*.experts.*"
KEEPS = (19 / 32, 12 / 32)
"""Near 0.6 and 0.4; uniform ranks, 19 and 12, leave nothing of these budgets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help="for training and calibration"
    )
    parser.add_argument("--held-out", metavar="FILE", type=Path, required=True)
    parser.add_argument("--steps", metavar="N", type=int, default=900, help="of training")
    parser.add_argument("--seed", metavar="N", type=int, nargs="+", default=[0], help="of models")
    parser.add_argument("--samples", metavar="N", type=int, default=64, help="of calibration")
    parser.add_argument("--windows", metavar="N", type=int, default=512, help="held out")
    parser.add_argument("--keep", metavar="FRACTION", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--only", metavar="ROW", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--directory",
        metavar="DIR",
        type=Path,
        help="keep all files there; a model in dense-SEED is not trained again",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.directory or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        models = {str(seed): measure(root, options, seed) for seed in options.seed}
    packages = ("orchestrator", "torch", "transformers")
    return {
        "models": models,
        "steps": options.steps,
        "samples": options.samples,
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {options.threads} threads",
    }


def measure(root: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train a model, compress its experts in every way, and evaluate all results."""
    dense, losses = root / f"dense-{seed}", list[float]()
    if not dense.is_dir():
        model = make_moe(seed)
        say(f"training {sum(p.numel() for p in model.parameters()):,} parameters")
        losses = train(model, options.text.read_bytes(), steps=options.steps, seed=seed)
        save(model, dense)
    rows: dict[str, dict[str, Any]] = {}
    for name in options.only:
        for keep in options.keep:
            label = f"{name} {keep:g}"
            out = root / f"{label.replace(' ', '-').replace(',', '')}-{seed}"
            compress(options, dense, out, ROWS[name], keep=keep, run_dir=root / f"run-{seed}")
            rows[label] = evaluated(options, out, dense)
            print(f"{label}: {json.dumps(rows[label])}", flush=True)
    show(rows)
    return {"training_losses": losses, "rows": rows}


def compress(
    options: argparse.Namespace,
    dense: Path,
    out: Path,
    given: Mapping[str, Any],
    *,
    keep: float,
    run_dir: Path,
) -> None:
    """Compress the experts; rows with the same decompositions share them in the run directory."""
    recipe = Recipe(
        model=str(dense),
        out=str(out),
        target=(EXPERTS,),
        calibration=str(options.text),
        samples=options.samples,
        sequence_length=LENGTH,
        keep=keep,
        executor="local",
        threads=options.threads,
        run_dir=str(run_dir),
        **given,
    )
    orchestrator.compress(recipe)


def evaluated(options: argparse.Namespace, out: Path, dense: Path) -> dict[str, Any]:
    """Compare a result with the dense model on the held-out text."""
    found = orchestrator.evaluate(
        out,
        against=str(dense),
        text=str(options.held_out),
        samples=options.windows,
        sequence_length=LENGTH,
        executor="local",
        threads=options.threads,
        run_dir=f"{out}.evaluation",
    )
    losses = {name: math.log(each["perplexity"]) for name, each in found["models"].items()}
    return {
        "loss": losses["model"],
        "rise": losses["model"] - losses["against"],
        "kl": found["kl"],
        "expert_bytes": expert_bytes(out),
    }


def expert_bytes(directory: Path) -> int:
    """Count the bytes of all tensors of experts in a checkpoint."""
    files = [load_file(path) for path in directory.glob("*.safetensors")]
    return sum(t.nbytes for file in files for name, t in file.items() if ".experts." in name)


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = [("", "rise, nats", "KL", "experts, bytes")]
    for name, row in rows.items():
        cells = (f"{row['rise']:.4f}", f"{row['kl']:.4f}", f"{row['expert_bytes']:,}")
        table.append((name, *cells))
    print_table(table)
