"""Robust PCA compared with the textbook loop with a thin SVD, and a large one with its FLOPs.

split  one weight to the default tolerance, in turns, one thread: time, and how far iterations,
       rank and support are from the textbook's. Without --model a random weight of 1536 x 576.
large  three iterations of a square weight, random plus low rank: the time of one, with its part
       of what comes before and after, over that of its FLOPs at the rate of a GEMM

Times are the processor's: with one thread those of the wall on an idle machine, and less moved by
other programs on a busy one.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import Figure, compare, in_turns, print_figures, print_table, say
from safetensors import safe_open
from torch import Tensor

from orchestrator.linalg.low_rank import Precision
from orchestrator.linalg.sparsity.rpca import RobustPCA, Solver, rpca

PARTS = ("split", "large")
TARGETS: dict[Precision, float] = {"exact": 1.7, "fast": 3.0}
SHAPE = 1536, 576
ITERATIONS = 3
"""Iterations on the large weight."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", type=Path, help="holds model.safetensors")
    parser.add_argument(
        "--linear", metavar="NAME", default="model.layers.15.mlp.up_proj", help="of the model"
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--side", type=int, default=4096, help="of the large weight")
    parser.add_argument("--repeats", type=int, default=3, help="turns of the part split")


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    figures: list[Figure] = []
    more: dict[str, Any] = {}
    if "split" in options.only:
        weight_OI = weight_of(options.model, options.linear)
        say(f"{options.repeats} turns of a weight of {' x '.join(map(str, weight_OI.shape))}")
        found, more["split"] = measure_split(weight_OI, options.repeats)
        figures += found
    if "large" in options.only:
        say(f"{ITERATIONS} iterations of a weight of {options.side} x {options.side}")
        figures += measure_large(options.side)
    print_figures(figures)
    if "split" in more:
        print_table([tuple(more["split"][0]), *(tuple(row.values()) for row in more["split"])])
    return {"figures": [each.to_json() for each in figures], **more}


def textbook(
    weight_OI: Tensor,
    solver: Solver = "ialm",
    tolerance: float = 1e-7,
    max_iterations: int = 100,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Run the textbook loop with a thin SVD; returns L, S, Y and the number of iterations."""
    penalty = 1 / math.sqrt(max(weight_OI.shape))
    norm = torch.linalg.matrix_norm(weight_OI, 2)
    if solver == "ialm":
        growth, mu = 1.5, float(1.25 / norm)
        dual_OI = weight_OI / max(norm, weight_OI.abs().max() / penalty)
    else:
        growth, mu = 1.0, float(weight_OI.numel() / (4 * weight_OI.abs().sum()))
        dual_OI = torch.zeros_like(weight_OI)
    sparse_OI = torch.zeros_like(weight_OI)
    iterations, residual = 0, math.inf
    while residual > tolerance and iterations < max_iterations:
        left_OK, sigma_K, right_KI = torch.linalg.svd(
            weight_OI - sparse_OI + dual_OI / mu, full_matrices=False
        )
        low_rank_OI = (left_OK * soft(sigma_K, 1 / mu)) @ right_KI
        sparse_OI = soft(weight_OI - low_rank_OI + dual_OI / mu, penalty / mu)
        gap_OI = weight_OI - low_rank_OI - sparse_OI
        dual_OI = dual_OI + mu * gap_OI
        mu *= growth
        residual = float(gap_OI.norm() / weight_OI.norm())
        iterations += 1
    return low_rank_OI, sparse_OI, dual_OI, iterations


def soft(values: Tensor, threshold: float) -> Tensor:
    """Shrink values towards zero by a threshold."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def weight_of(model: Path | None, linear: str) -> Tensor:
    """Load a linear's weight in float64; without a model, random with dominant directions and
    entries."""
    if model is not None:
        with safe_open(model / "model.safetensors", "pt") as file:
            return file.get_tensor(f"{linear}.weight").double()
    outputs, inputs = SHAPE
    return random_plus_low_rank(outputs, inputs, rank=inputs // 6)


def random_plus_low_rank(outputs: int, inputs: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise_OI, left_OR, right_RI = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((outputs, inputs), (outputs, rank), (rank, inputs))
    )
    return noise_OI + left_OR @ right_RI / rank**0.5


def measure_split(weight_OI: Tensor, repeats: int) -> tuple[list[Figure], list[dict[str, str]]]:
    """Measure splits per second of both precisions and the textbook loop, and compare the
    results."""
    low_rank_OI, sparse_OI, _, iterations = textbook(weight_OI)
    rank = int(torch.linalg.matrix_rank(low_rank_OI, rtol=1e-8))
    support_OI = sparse_OI != 0
    ways = {"textbook": partial(rate, lambda: textbook(weight_OI))}
    rows = []
    for precision in TARGETS:
        ways[precision] = partial(rate, partial(rpca, weight_OI, precision=precision))
        result = rpca(weight_OI, precision=precision)
        differ = int((support_of(result) != support_OI).sum())
        rows.append(
            {
                "robust PCA": precision,
                "iterations": f"{result.report['iterations']} ({iterations})",
                "in float32": str(result.report["narrow_iterations"]),
                "rank": f"{result.report['rank']} ({rank})",
                "density": f"{result.report['density']:.4f}",
                "support differs": f"{differ} of {support_OI.numel()}",
            }
        )
    found = in_turns(ways, repeats)
    figures = [
        compare(
            f"robust PCA, {precision}, against the textbook",
            found[precision],
            found["textbook"],
            unit="1/s",
            target=target,
            at_least=True,
        )
        for precision, target in TARGETS.items()
    ]
    return figures, rows


def support_of(result: RobustPCA) -> Tensor:
    """Mask of the nonzero entries of S."""
    support_OI = torch.zeros(len(result.weight_OR), result.down_RI.shape[1], dtype=torch.bool)
    support_OI.view(-1)[result.positions_N.long()] = True
    return support_OI


def measure_large(side: int) -> list[Figure]:
    """Measure seconds per iteration in each precision, and the fraction of `eigh`."""
    weight_OI = random_plus_low_rank(side, side, rank=side // 16)
    figures = []
    for precision in TARGETS:
        start = time.process_time()
        result = rpca(weight_OI, precision=precision, max_iterations=ITERATIONS)
        spent = (time.process_time() - start) / ITERATIONS
        narrow = int(result.report["narrow_iterations"])
        dtypes = [torch.float32] * narrow + [torch.float64] * (ITERATIONS - narrow)
        flops = iteration_flops(side, int(result.report["rank"]))
        floor = sum(flops / gemm_rate(dtype) for dtype in dtypes) / ITERATIONS
        figures.append(
            compare(
                f"iteration of {side} x {side}, {precision}, over its FLOPs",
                [spent],
                [floor],
                unit="s",
            )
        )
    square_II = weight_OI.T @ weight_OI
    for dtype in (torch.float32, torch.float64):
        matrix_II = square_II.to(dtype)
        spent = 1 / rate(partial(torch.linalg.eigh, matrix_II, UPLO="U"))
        floor = eigh_flops(side, side) / gemm_rate(dtype)
        name = f"eigh of {side} x {side}, {str(dtype).removeprefix('torch.')}, over its FLOPs"
        figures.append(compare(name, [spent], [floor], unit="s"))
    return figures


def iteration_flops(side: int, rank: int) -> float:
    """FLOPs of the triangle of the Gram, the eigenvectors above the threshold, and L from them."""
    return (
        side**3 + eigh_flops(side, rank) + min(2 * side**3 + 2 * rank * side**2, 4 * rank * side**2)
    )


def eigh_flops(side: int, rank: int) -> float:
    """FLOPs of the tridiagonal reduction, and of the back-transformation of eigenvectors.

    The eigenvectors of the tridiagonal matrix are not counted: divide and conquer costs at most as
    much as the reduction, and much less with deflation.
    """
    return 4 / 3 * side**3 + 2 * rank * side**2


def gemm_rate(dtype: torch.dtype) -> float:
    """Measure FLOP/s of a product of 1024 x 1024, the median of several."""
    square = torch.randn(1024, 1024, dtype=dtype)
    return 2 * 1024**3 * statistics.median(rate(lambda: square @ square) for _ in range(9))


def rate(work: Callable[[], object]) -> float:
    """Number of executions per CPU second."""
    start = time.process_time()
    work()
    return 1 / (time.process_time() - start)
