"""Symmetric eigendecompositions by size, dtype and triangle; rates count 9 n^3 FLOPs."""

from functools import partial
from typing import Any

import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from benchmarks.gpu.rates import asked_for
from torch import Tensor


def measure(bench: Bench) -> PartResult:
    rows = []
    for size in bench.size((1024, 2048, 4096, 8192), (64, 128)):
        square_II = second_moment(size, bench.device)
        for dtype in (torch.float64, torch.float32):
            for triangle in ("U", "L"):
                rows.append(decomposed(bench, square_II.to(dtype), triangle))
    largest = asked_for(rows)
    rate = largest["rate"] / 1e12
    line = (
        f"n = {largest['size']}, float64: {largest['seconds']:.3g} s, {rate:.3g} TFLOP/s of 9 n^3"
    )
    return PartResult(line, rows, tuple(check for row in rows for check in checks_of(row)))


def second_moment(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(size)
    options = {"dtype": torch.float64, "device": device, "generator": generator}
    rows_TI = torch.randn(size, size, **options)
    return rows_TI.T @ rows_TI / size


def decomposed(bench: Bench, matrix_II: Tensor, triangle: str) -> dict[str, Any]:
    """Return the better of two times after one warm-up, memory, errors, and True if bits repeat."""
    work = partial(torch.linalg.eigh, matrix_II, UPLO=triangle)
    bench.free()
    before = torch.cuda.memory_allocated() if bench.is_cuda else 0
    values_I, vectors_II = work()
    peak = bench.peak_bytes()
    (_, again_II), first = bench.timed(work)
    same_bits = torch.equal(vectors_II, again_II)
    del again_II
    seconds = min(first, bench.timed(work)[1])
    scale = float(values_I.abs().max())
    gap_II = matrix_II @ vectors_II - vectors_II * values_I
    product_II = vectors_II.T @ vectors_II
    product_II.diagonal().sub_(1)
    return {
        "size": len(matrix_II),
        "dtype": str(matrix_II.dtype).removeprefix("torch."),
        "triangle": triangle,
        "seconds": seconds,
        "rate": 9.0 * len(matrix_II) ** 3 / seconds,
        "same_bits": same_bits,
        # vectors and workspace; the forecast's EIGENVECTOR_COPIES
        "matrices_beside_it": None if peak is None else (peak - before) / matrix_II.nbytes,
        "residual": float(gap_II.abs().max()) / scale,
        "orthonormality": float(product_II.abs().max()),
    }


def checks_of(row: dict[str, Any]) -> list[Check]:
    name = f"{row['size']}, {row['dtype']}, {row['triangle']}"
    # of a backward stable algorithm, times the spectral norm; LAPACK's are below a tenth of it
    bound = row["size"] * torch.finfo(getattr(torch, row["dtype"])).eps
    return [
        Check(f"same bits, {name}", row["same_bits"]),
        *(Check(f"{what}, {name}", row[what], bound) for what in ("residual", "orthonormality")),
    ]
