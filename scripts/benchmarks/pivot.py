"""Forward passes of pivoted factors compared with plain ones, timed in turns.

For every shape and number of rows: a plain linear of the uniform rank at the kept fraction, a
pivoted one of the same rank, which stores R^2 fewer values, and a pivoted one with as many values
as the plain one, which has a larger rank. Values and inputs are random.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.common.figures import Figure, compare, in_turns, print_figures, say

from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.linear import Linear

SHAPES = ("576x576", "1536x576", "576x1536", "4096x4096", "11008x4096", "4096x11008")
"""Outputs by inputs, of SmolLM2-135M and of a model with 7B parameters."""
ROWS = (1, 4, 16, 64, 512)
TARGET = 1.0
TARGET_ROWS = 16
"""Number of rows from which on pivoted factors of equal rank must not be slower than plain ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", metavar="OxI", nargs="+", default=SHAPES)
    parser.add_argument("--rows", metavar="N", type=int, nargs="+", default=ROWS)
    parser.add_argument("--keep", metavar="FRACTION", type=float, default=0.8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="turns")


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    figures: list[Figure] = []
    for shape in options.shapes:
        outputs, inputs = (int(side) for side in shape.split("x"))
        say(f"a {shape} weight")
        figures += measure(outputs, inputs, options)
    print_figures(figures)
    return {"figures": [each.to_json() for each in figures]}


def ranks_of(outputs: int, inputs: int, keep: float) -> tuple[int, int]:
    """Return the plain rank at a kept fraction, and the largest pivoted rank with as few values."""
    linear = Linear(
        name="linear",
        block=0,
        role="linear",
        site="linear",
        out_features=outputs,
        in_features=inputs,
        has_bias=False,
    )
    rank = LOW_RANK.rank_within(linear, int(keep * linear.values))
    return rank, PIVOTED.rank_within(linear, LOW_RANK.factor_values(linear, rank))


@torch.no_grad()
def measure(outputs: int, inputs: int, options: argparse.Namespace) -> list[Figure]:
    """Measure two figures per number of rows: pivoted over plain at equal rank, and at equal
    values."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rank, more = ranks_of(outputs, inputs, options.keep)
    made = {"bias": False, "device": device, "dtype": dtype}
    modules = {
        "plain": LowRankLinear(inputs, outputs, rank, **made),
        "equal rank": PivotedLinear(inputs, outputs, rank, **made),
        "equal values": PivotedLinear(inputs, outputs, more, **made),
    }
    for module in modules.values():
        fill(module)
    figures = []
    for rows in options.rows:
        input_TI = torch.randn(rows, inputs, dtype=dtype, device=device)
        ways = {name: timer(module, input_TI) for name, module in modules.items()}
        found = in_turns(ways, options.repeats, warm_up=2)
        for name in ("equal rank", "equal values"):
            is_aimed = name == "equal rank" and rows >= TARGET_ROWS
            figures.append(
                compare(
                    f"{outputs} x {inputs}, {rows} rows, {name}",
                    found[name],
                    found["plain"],
                    unit="us",
                    target=TARGET if is_aimed else None,
                )
            )
    return figures


def fill(module: torch.nn.Module) -> None:
    """Fill with random values, and outputs in a random order."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if isinstance(module, PivotedLinear):
        module.index.copy_(torch.randperm(module.out_features))


def timer(module: torch.nn.Module, input_TI: torch.Tensor) -> Callable[[], float]:
    """Return a function that measures the microseconds of a forward pass, from about 20 ms of
    passes."""

    def seconds(passes: int) -> float:
        if input_TI.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            module(input_TI)
        if input_TI.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    passes = max(1, round(0.02 / seconds(3) * 3))
    return lambda: 1e6 * seconds(passes) / passes
