"""Decompositions with shapes of a 70B model: time compared with the published algorithm and FLOPs.

Two linears, [n, n] and [n, 3.5 n] at n = 8192, random weights, inputs whose energies fall as j^-1.2
from one direction to the next: a second moment of full rank H = P diag(j^-1.2) P^T, P a product of
32 reflections, so that every error can be computed exactly, in float64, without multiplying by H.

The published algorithm is that of SVD-LLM (arXiv 2403.07378): a float64 Cholesky factor of H and
its inverse, and a float32 thin SVD of the whitened weight. The inverse here is triangular, with
less than half of the work of the general one in the authors' code. Ours is
`orchestrator.linalg.low_rank`. Lower bounds are FLOPs at the rate of products on this machine, with
9 n^3 for an eigendecomposition, which no solver reaches.

`ways` shows alternatives for the eigenproblem, at a quarter of n: the time relative to LAPACK in
float64, and the excess loss at break-even rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.common.clock import median_seconds, timed
from benchmarks.common.figures import print_table, say
from torch import Tensor

from orchestrator.linalg.low_rank import InputGram, LowRank, OutputGram, decompose
from orchestrator.linalg.speeds import product_rate

CPU = torch.device("cpu")
REFLECTIONS = 32
DECAY = 1.2
ASKED = 3.0
"""Required speedup over the published algorithm, for both linears together."""


@dataclass(frozen=True)
class SecondMoment:
    """H = P diag(energies) P^T."""

    energies_I: Tensor
    vectors_LI: Tensor
    """Unit normals of the reflections."""

    @classmethod
    def of(cls, size: int, device: torch.device = CPU) -> "SecondMoment":
        """Make the same numbers on every device, up to the rounding of the normals' lengths."""
        generator = torch.Generator().manual_seed(size)
        vectors_LI = torch.randn(REFLECTIONS, size, generator=generator, dtype=torch.float64)
        vectors_LI = vectors_LI.to(device)
        energies_I = torch.arange(1, size + 1, dtype=torch.float64, device=device) ** -DECAY
        return cls(energies_I, vectors_LI / vectors_LI.norm(dim=1, keepdim=True))

    def turned(self, rows_NI: Tensor) -> Tensor:
        """Multiply rows by P."""
        rows_NI = rows_NI.double().clone()
        for vector_I in self.vectors_LI:
            rows_NI.addr_(rows_NI @ vector_I, vector_I, alpha=-2)
        return rows_NI

    def matrix(self) -> Tensor:
        """Compute H in the memory of one matrix: reflected from both sides."""
        found_II = torch.diag(self.energies_I)
        for vector_I in self.vectors_LI.flip(0):
            found_II.addr_(found_II @ vector_I, vector_I, alpha=-2)
            found_II.addr_(vector_I, vector_I @ found_II, alpha=-2)
        return found_II

    def loss(self, gap_OI: Tensor, curvature_OO: Tensor | None = None) -> float:
        """Compute trace(C D H D^T); without a curvature C = 1."""
        turned_OI = self.turned(gap_OI)
        image_OI = turned_OI if curvature_OO is None else curvature_OO @ turned_OI
        return float(((turned_OI * image_OI) @ self.energies_I).sum())

    def output_moment(self, weight_OI: Tensor) -> Tensor:
        """Compute W H W^T, as in a calibration with output Grams."""
        turned_OI = self.turned(weight_OI)
        return (turned_OI * self.energies_I) @ turned_OI.T


@dataclass(frozen=True)
class Problem:
    """Random weight with the second moment of its inputs, to be truncated at break-even rank."""

    weight_OI: Tensor
    moment: SecondMoment

    @classmethod
    def of(cls, outputs: int, inputs: int, device: torch.device = CPU) -> "Problem":
        generator = torch.Generator().manual_seed(outputs + inputs)
        weight_OI = torch.randn(outputs, inputs, generator=generator).to(device) / inputs**0.5
        return cls(weight_OI, SecondMoment.of(inputs, device))

    @property
    def rank(self) -> int:
        outputs, inputs = self.weight_OI.shape
        return outputs * inputs // (outputs + inputs)

    @property
    def is_wide(self) -> bool:
        """True if the Gram of the outputs is the smaller one and is therefore gathered."""
        outputs, inputs = self.weight_OI.shape
        return inputs > outputs

    def statistic(self) -> InputGram | OutputGram:
        if self.is_wide:
            return OutputGram(self.moment.output_moment(self.weight_OI))
        return InputGram(self.moment.matrix())

    def loss(self, left_OR: Tensor, right_RI: Tensor, curvature_OO: Tensor | None = None) -> float:
        """Compute the loss of a product in float64: rounding in float32 would appear as a gain."""
        gap_OI = self.weight_OI.double() - left_OR.double() @ right_RI.double()
        return self.moment.loss(gap_OI, curvature_OO)


def published(weight_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute factors of a rank; overwrites the Gram, so that only one more of it is in memory."""
    lower_II = torch.linalg.cholesky(gram_II, out=gram_II)
    single_II = lower_II.float()
    left_OK, sigma_K, right_KI = torch.linalg.svd(weight_OI @ single_II, full_matrices=False)
    del single_II
    root_R = sigma_K[:rank].sqrt()
    factors = left_OK[:, :rank] * root_R, root_R[:, None] * right_KI[:rank]
    del left_OK, right_KI
    eye_II = torch.eye(len(lower_II), dtype=torch.float64, device=lower_II.device)
    inverse_II = torch.linalg.solve_triangular(lower_II, eye_II, upper=False, out=eye_II)
    return factors[0], factors[1] @ inverse_II.float()


def product_rates(size: int, device: torch.device = CPU) -> dict[torch.dtype, float]:
    """Measure FLOP/s of products in the dtypes of decompositions."""
    return {dtype: product_rate(dtype, device, size) for dtype in (torch.float64, torch.float32)}


def measure_linears(size: int, wide: int) -> list[dict[str, Any]]:
    """Measure our method and the published one on both linears."""
    rates, rows = product_rates(min(size, 4096)), []
    for inputs in (size, wide):
        problem = Problem.of(size, inputs)
        row = measure_ours(problem, rates)
        rows.append(row | measure_published(problem, row["optimum"]))
    return rows


def measure_ours(
    problem: Problem, rates: Mapping[torch.dtype, float], repeats: int = 1
) -> dict[str, Any]:
    """Measure the seconds of a decomposition, their lower bound, and the excess loss.

    Args:
        repeats: Number of runs. The first one on a GPU also makes the handles of its libraries, so
            the last time counts; all must give the same bits.
    """
    outputs, inputs = problem.weight_OI.shape
    rank = problem.rank
    say(f"{outputs} x {inputs}: ours")
    result, seconds, same_bits = decompose_again(problem, repeats)
    optimum = float(result.energies_K[rank:].sum())
    cube = float(outputs) ** 3
    double = 9 * cube + (0 if problem.is_wide else 3.2 * cube)
    single = 2.0 * outputs * rank * inputs + 2.0 * outputs * outputs * rank
    return {
        "shape": [outputs, inputs],
        "rank": rank,
        "seconds": seconds[-1],
        "first_seconds": seconds[0],
        "same_bits": same_bits,
        "floor_seconds": double / rates[torch.float64] + single / rates[torch.float32],
        "optimum": optimum,
        "above_optimum": problem.loss(result.weight_OR, result.down_RI) / optimum - 1,
        "report": dict(result.report),
        "rates": {str(dtype): rate for dtype, rate in rates.items()},
    }


def measure_published(problem: Problem, optimum: float) -> dict[str, Any]:
    outputs, inputs = problem.weight_OI.shape
    say(f"{outputs} x {inputs}: the published way")
    work = partial(published, problem.weight_OI, problem.moment.matrix(), problem.rank)
    factors, seconds = timed(work, problem.weight_OI.device)
    del work
    return {
        "published_seconds": seconds,
        "published_above_optimum": problem.loss(*factors) / optimum - 1,
    }


def decompose_again(problem: Problem, repeats: int) -> tuple[LowRank, list[float], bool]:
    """Return the result, the seconds of each run, and True if all runs gave the same bits."""
    work = partial(decompose, problem.weight_OI, problem.statistic(), problem.rank)
    result, first = timed(work, problem.weight_OI.device)
    seconds, same_bits = [first], True
    for _ in range(repeats - 1):
        other, spent = timed(work, problem.weight_OI.device)
        seconds.append(spent)
        same_bits &= torch.equal(result.weight_OR, other.weight_OR)
        same_bits &= torch.equal(result.down_RI, other.down_RI)
    return result, seconds, same_bits


def measure_ways(size: int, repeats: int) -> list[dict[str, Any]]:
    """Measure algorithms for the leading eigenvectors of one second moment, to break-even rank."""
    generator = torch.Generator().manual_seed(size)
    weight_OI = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    moment_KK = SecondMoment.of(size).output_moment(weight_OI)
    moment_KK = (moment_KK + moment_KK.T) / 2
    rank = size // 2
    best = float(torch.linalg.eigvalsh(moment_KK)[: size - rank].sum())
    ways: Mapping[str, Callable[[], Tensor]] = {
        "LAPACK, float64": lambda: torch.linalg.eigh(moment_KK, UPLO="U")[1][:, -rank:],
        "LAPACK, float32": lambda: torch.linalg.eigh(moment_KK.float(), UPLO="U")[1][:, -rank:],
        "float32, refined once": lambda: refined(moment_KK, 1)[:, -rank:],
        "float32, refined twice": lambda: refined(moment_KK, 2)[:, -rank:],
        "subspace, 2 rounds": lambda: subspace(moment_KK, rank, 2),
        "subspace, 4 rounds": lambda: subspace(moment_KK, rank, 4),
    }
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        say(f"eigenvectors of {size}: {name}")
        seconds = median_seconds(way, CPU, repeats=repeats, warm_up=0)
        basis_KR = torch.linalg.qr(way().double())[0]
        kept = float(torch.sum(basis_KR * (moment_KK @ basis_KR)))
        lost = (float(moment_KK.trace()) - kept) / best - 1
        rows.append({"way": name, "seconds": seconds, "above_optimum": lost})
    return rows


def refined(moment_KK: Tensor, rounds: int) -> Tensor:
    """Compute eigenvectors in float32, refined by products in float64 (Ogita and Aishima, 2018).

    Each round squares the error for separated eigenvalues; directions of close eigenvalues are not
    changed among themselves.
    """
    vectors_KK = torch.linalg.eigh(moment_KK.float(), UPLO="U")[1].double()
    eye_KK = torch.eye(len(moment_KK), dtype=torch.float64)
    for _ in range(rounds):
        residual_KK = eye_KK - vectors_KK.T @ vectors_KK
        product_KK = vectors_KK.T @ (moment_KK @ vectors_KK)
        values_K = product_KK.diagonal() / (1 - residual_KK.diagonal())
        apart_KK = values_K[None, :] - values_K[:, None]
        error_KK = product_KK + values_K[None, :] * residual_KK
        limit = 2 * float(
            torch.linalg.matrix_norm(product_KK - torch.diag(values_K))
            + values_K.abs().max() * torch.linalg.matrix_norm(residual_KK)
        )
        close_KK = apart_KK.abs() <= limit / len(values_K)
        correction_KK = torch.where(close_KK, residual_KK / 2, error_KK / apart_KK)
        vectors_KK = vectors_KK + vectors_KK @ correction_KK
    return vectors_KK


def subspace(moment_KK: Tensor, rank: int, rounds: int) -> Tensor:
    """Compute the leading directions by subspace iteration from random ones, with an eighth extra.

    A final Rayleigh-Ritz step sorts them, as truncation at any rank requires.
    """
    generator = torch.Generator().manual_seed(0)
    columns = min(rank + rank // 8, len(moment_KK))
    block_KC = torch.randn(len(moment_KK), columns, generator=generator, dtype=torch.float64)
    for _ in range(rounds):
        block_KC = torch.linalg.qr(moment_KK @ block_KC)[0]
    turn_CC = torch.linalg.eigh(block_KC.T @ (moment_KK @ block_KC))[1]
    return block_KC @ turn_CC[:, -rank:]


def show_linears(rows: list[dict[str, Any]]) -> None:
    table = [
        (
            *("linear", "ours", "published", "faster", "floor", "ours / floor"),
            *("above the optimum", "published"),
        )
    ]
    sums = {n: sum(row[n] for row in rows) for n in ("seconds", "published_seconds")}
    for row in rows:
        table.append(
            (
                f"{row['shape'][0]} x {row['shape'][1]}",
                f"{row['seconds']:.0f} s",
                f"{row['published_seconds']:.0f} s",
                f"{row['published_seconds'] / row['seconds']:.1f}",
                f"{row['floor_seconds']:.0f} s",
                f"{row['seconds'] / row['floor_seconds']:.2f}",
                f"{row['above_optimum']:.1e}",
                f"{row['published_above_optimum']:.1e}",
            )
        )
    print_table(table)
    together = sums["published_seconds"] / sums["seconds"]
    print(f"together {together:.1f} times as fast; asked {ASKED:g}")


def show_ways(rows: list[dict[str, Any]]) -> None:
    base = rows[0]["seconds"]
    table = [("eigenvectors to break-even rank", "time", "above the optimum")]
    for row in rows:
        table.append(
            (row["way"], f"{row['seconds'] / base:.2f}", f"{max(row['above_optimum'], 0):.1e}")
        )
    print_table(table)
