"""Speed of dense, low-rank and pivoted models in transformers and in vLLM, measured in turns.

Prefill of 512 tokens of one sequence, and decoding of 1 and 8 sequences after 32 tokens each, in
float32 with one thread. The models are SmolLM2-135M and a Llama of width 2048 with 4 blocks and
next to no vocabulary, so that its time is that of the blocks; both dense, and with factors at kept
fractions 0.8 and 0.6. Ranks are uniform multiples (--rank-multiple auto); values of factors are
random, right for speed alone. The CPU time of whole processes counts, which other programs lengthen
less than the time that passes. A ratio is the median over the turns of dense over compressed.

The environment of vLLM is that of scripts/test_vllm, which makes it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

ENGINES = ("transformers", "vllm")
MODELS = ("width-2048", "smollm2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smollm2",
        metavar="DIR",
        type=Path,
        default=Path(".work/smollm2-135m-instruct"),
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        default=Path(".work/serving"),
        help="checkpoints, made unless they are there",
    )
    parser.add_argument(
        "--vllm",
        metavar="PYTHON",
        type=Path,
        default=Path(".venv-vllm/bin/python"),
        help="interpreter of the environment with vLLM",
    )
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--turns", type=int, default=5)


def run(options: argparse.Namespace) -> dict[str, Any]:
    # read before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.serving.course import measure

    return measure(options)
