"""Forward passes of dense, low-rank and pivoted linears, compared with dense and the roofline."""

import copy
from functools import partial
from typing import Any

import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from benchmarks.gpu.parts.machine import bandwidth
from benchmarks.pivot import fill, ranks_of
from torch import Tensor, nn

from orchestrator.linalg.speeds import product_rate
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.pivoted import PivotedLinear

KEEPS = (0.8, 0.6, 0.4)
DTYPE = torch.bfloat16
PASSES = 20
"""Passes in a graph, and in a row without one."""
ERROR = 1e-2
"""Largest relative error of outputs against a product in float64 with the same weight: three
roundings to bfloat16, of 2^-9 each, and sums in float32."""


@torch.no_grad()
def measure(bench: Bench) -> PartResult:
    size = bench.size(8192, 128)
    ceilings = product_rate(DTYPE, bench.device, size), bandwidth(bench)
    rows, checks = [], []
    for outputs, inputs in ((size, size), (7 * size // 2, size), (size, 7 * size // 2)):
        bench.free()
        modules = modules_of(outputs, inputs, bench.device)
        for tokens in bench.size((1, 8, 64, 2048), (1, 8, 16, 32)):
            found = [
                passed(bench, module, tokens, ceilings) | {"form": form, "keep": keep}
                for (form, keep), module in modules.items()
            ]
            for row in found:
                row["over_dense"] = row["seconds"] / found[0]["seconds"]
            rows += found
            bench.say(in_words(found))
        checks += [
            Check(f"{outputs} x {inputs}, {form} {keep}: outputs apart", apart(module), ERROR)
            for (form, keep), module in modules.items()
        ]
    if bench.is_cuda:
        same = all(row["graph_same_bits"] for row in rows)
        checks.append(Check("graphs give the bits of eager passes", same))
    return PartResult(f"{len(rows)} linears by tokens", rows, tuple(checks))


def modules_of(
    outputs: int, inputs: int, device: torch.device
) -> dict[tuple[str, float], nn.Module]:
    """Modules by form and kept fraction of the dense values; the dense one first."""
    made = {"bias": False, "device": device, "dtype": DTYPE}
    modules: dict[tuple[str, float], nn.Module] = {
        ("dense", 1.0): nn.Linear(inputs, outputs, **made)
    }
    for keep in KEEPS:
        plain, pivoted = ranks_of(outputs, inputs, keep)
        modules["low_rank", keep] = LowRankLinear(inputs, outputs, plain, **made)
        modules["pivoted", keep] = PivotedLinear(inputs, outputs, pivoted, **made)
    for module in modules.values():
        fill(module)
    return modules


def passed(
    bench: Bench, module: nn.Module, tokens: int, ceilings: tuple[float, float]
) -> dict[str, Any]:
    """Measure the seconds of a pass, on CUDA from a graph; also eager, and the roofline.

    Args:
        ceilings: FLOP/s and bytes/s.
    """
    outputs, inputs = module.out_features, module.in_features
    input_TI = torch.randn(tokens, inputs, device=bench.device, dtype=DTYPE)
    work = partial(passes, module, input_TI)
    eager = bench.median_seconds(work) / PASSES
    seconds, same_bits = graphed(bench, module, input_TI) if bench.is_cuda else (eager, None)
    values = sum(parameter.numel() for parameter in module.parameters())
    moved = DTYPE.itemsize * (values + tokens * (inputs + outputs))
    flops, rate = ceilings
    floor = max(moved / rate, 2.0 * values * tokens / flops)
    return {
        "shape": [outputs, inputs],
        "tokens": tokens,
        "seconds": seconds,
        "eager_seconds": eager,
        "over_floor": seconds / floor,
        "graph_same_bits": same_bits,
    }


def passes(module: nn.Module, input_TI: Tensor) -> Tensor:
    for _ in range(PASSES):
        output_TO = module(input_TI)
    return output_TO


def graphed(bench: Bench, module: nn.Module, input_TI: Tensor) -> tuple[float, bool]:
    """Measure the seconds of a pass without launches; also True if it has the bits of an
    eager one."""
    # before a capture, libraries must be set up by passes on a side stream
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected_TO = module(input_TI)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output_TO = passes(module, input_TI)
    seconds = bench.median_seconds(graph.replay, repeats=5, warm_up=2) / PASSES
    return seconds, torch.equal(output_TO, expected_TO)


def apart(module: nn.Module) -> float:
    """Relative error of outputs against those of the dense weight in float64."""
    wide = copy.deepcopy(module).double()
    weight_OI = wide.weight if isinstance(wide, nn.Linear) else wide.dense_weight()
    shape = (8, module.in_features)
    input_TI = torch.randn(shape, device=weight_OI.device, dtype=DTYPE)
    expected_TO = input_TI.double() @ weight_OI.T
    return float((module(input_TI).double() - expected_TO).norm() / expected_TO.norm())


def in_words(rows: list[dict[str, Any]]) -> str:
    """Describe the rows of one shape and number of tokens."""
    dense, *others = rows
    first = f"{' x '.join(map(str, dense['shape']))}, {dense['tokens']} tokens"
    parts = [f"dense {1e3 * dense['seconds']:.3g} ms, {dense['over_floor']:.1f} floors"]
    parts += [
        f"{row['form']} {row['keep']} {row['over_dense']:.2f} of dense ({row['over_floor']:.1f})"
        for row in others
        if row["keep"] == KEEPS[1]
    ]
    return f"{first}: {'; '.join(parts)}"
