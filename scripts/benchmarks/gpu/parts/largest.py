"""Eigendecompositions of the widest Grams of large models: success and time.

cuSOLVER's query for workspace is known to fail above some 25,000, its older interface of 32 bits
at 26,732 in float64; down_proj of a 70B model has 28,672 inputs.
"""

from typing import Any

import torch
from benchmarks.gpu.bench import Bench, Check, PartResult

APART = {"float32": 1e-4, "float64": 1e-11}
"""Largest error of the eigenvalues, which are up to 4."""
SECONDS = 30
"""Minimum time left to start another one."""


def measure(bench: Bench) -> PartResult:
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.float64):
        for size in bench.size((28_672, 25_000), (160, 144)):
            if rows and bench.seconds_left < SECONDS:
                break
            rows.append(attempt(bench, size, dtype))
            if rows[-1]["works"]:
                break  # smaller ones work too
    parts = [f"{row['size']} {row['dtype']} {in_words(row)}" for row in rows]
    checks = [
        Check(f"eigenvalues, {row['size']}, {row['dtype']}", row["apart"], APART[row["dtype"]])
        for row in rows
        if row["works"]
    ]
    return PartResult("; ".join(parts), rows, tuple(checks))


def in_words(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.1f} s" if row["works"] else f"FAILS: {row['error'][:100]}"


def attempt(bench: Bench, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """One decomposition of a diagonal matrix with two entries beside the diagonal in each row."""
    bench.free()
    row = {"size": size, "dtype": str(dtype).removeprefix("torch.")}
    try:
        ones_I = torch.ones(size, dtype=dtype, device=bench.device)
        matrix_II = torch.diag(2 * ones_I)
        for offset in (-1, 1):
            matrix_II.diagonal(offset).sub_(ones_I[1:])
        (values_I, _), seconds = bench.timed(lambda: torch.linalg.eigh(matrix_II, UPLO="U"))
    except RuntimeError as error:  # torch's errors of memory, cuSOLVER and LAPACK included
        return {**row, "works": False, "error": str(error)}
    # eigenvalues of the second difference: 2 - 2 cos(pi k / (n + 1))
    angles_I = torch.arange(1, size + 1, dtype=torch.float64, device=bench.device)
    expected_I = 2 - 2 * torch.cos(torch.pi * angles_I / (size + 1))
    apart = float((values_I.double() - expected_I).abs().max())
    return {**row, "works": True, "seconds": seconds, "apart": apart}
