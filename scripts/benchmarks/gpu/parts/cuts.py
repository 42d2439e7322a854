"""Decompositions of 70B shapes: one-sided, two-sided, and brought to pivoted storage."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.decompositions import Problem, SecondMoment, measure_ours, product_rates
from benchmarks.gpu.bench import Bench, Check, PartResult
from benchmarks.pivot import ranks_of

from orchestrator.linalg.low_rank import Curvature
from orchestrator.linalg.pivot import BOUND, pivot
from orchestrator.linalg.two_sided import decompose_two_sided

KEEP = 0.6
"""Kept fraction of the pivoted factors."""
DAMPING = 0.01
ABOVE = 1e-7
"""Largest loss of float32 factors above the optimum, relative to it."""
DEVIATION = 1e-8
"""Largest deviation relative to the total energy, in float32 products (`LowRank.report`)."""
PIVOTED = 1e-6
"""Largest error relative to the product's norm; rounding to float32 alone makes 1.5e-7."""


def measure(bench: Bench) -> PartResult:
    rows = []
    rates = product_rates(bench.size(4096, 128), bench.device)
    for problem in problems(bench):
        row = measure_ours(problem, rates, repeats=2)
        row |= two_sided_and_pivot(bench, problem)
        rows.append(row)
        bench.say(
            f"{in_words(row)}: ours {row['seconds']:.3g} s (its FLOPs {row['floor_seconds']:.3g}), "
            f"two-sided {row['two_sided_seconds']:.3g} s, pivot {row['pivot_seconds']:.3g} s with "
            f"{row['pivot']['exchanges']} exchanges"
        )
    worst = max(abs(row["above_optimum"]) for row in rows)
    line = f"{len(rows)} shapes, losses within {worst:.1e} of the optimum"
    return PartResult(line, rows, tuple(check for row in rows for check in checks_of(row)))


def problems(bench: Bench) -> Iterator[Problem]:
    """A square and a wide weight."""
    size = bench.size(8192, 128)
    for inputs in (size, 7 * size // 2):
        bench.free()
        yield Problem.of(size, inputs, bench.device)


def in_words(row: Mapping[str, Any]) -> str:
    return " x ".join(map(str, row["shape"]))


def two_sided_and_pivot(bench: Bench, problem: Problem) -> dict[str, Any]:
    """Figures with a curvature of the outputs, another second moment of the same kind."""
    bench.free()
    outputs, inputs = problem.weight_OI.shape
    curvature_OO = SecondMoment.of(outputs, bench.device).matrix()
    statistic = replace(problem.statistic(), curvature=Curvature(curvature_OO, 1))
    work = partial(decompose_two_sided, problem.weight_OI, statistic, problem.rank, damping=DAMPING)
    two, seconds = bench.timed(work)
    curvature_OO.diagonal().add_(DAMPING * curvature_OO.diagonal().mean())
    lost = problem.loss(two.weight_OR, two.down_RI, curvature_OO)
    del work, statistic, curvature_OO
    _, rank = ranks_of(outputs, inputs, KEEP)
    factors = two.weight_OR[:, :rank].contiguous(), two.down_RI[:rank]
    pivoted, pivot_seconds = bench.timed(partial(pivot, *factors))
    return {
        "two_sided_seconds": seconds,
        "two_sided_above_optimum": lost / float(two.energies_K[problem.rank :].sum()) - 1,
        "two_sided": dict(two.report),
        "pivot_rank": rank,
        "pivot_seconds": pivot_seconds,
        "pivot": dict(pivoted.report),
    }


def checks_of(row: dict[str, Any]) -> list[Check]:
    name = in_words(row)
    return [
        Check(f"{name}, same bits", row["same_bits"]),
        Check(f"{name}, loss above the optimum", abs(row["above_optimum"]), ABOVE),
        Check(f"{name}, its own measure of that", row["report"]["deviation"], DEVIATION),
        Check(f"{name}, two-sided above the optimum", abs(row["two_sided_above_optimum"]), ABOVE),
        Check(f"{name}, pivoted product's error", row["pivot"]["error"], PIVOTED),
        # the last solve may round above the bound that the exchanges have reached
        Check(f"{name}, largest coefficient", row["pivot"]["largest"], 1.001 * BOUND),
    ]
