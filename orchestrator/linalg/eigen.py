"""Symmetric eigendecompositions with a check of the result and fallback solvers.

Shape suffixes: N rows and columns, P probes.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from orchestrator.errors import InputError
from orchestrator.linalg.gram import check_finite

LARGEST: Mapping[str, int] = {"cuda": 25_000, "cpu": 32_766}
"""Largest number of rows for which a device's solver is called.

cuSOLVER's workspace query fails somewhere above 25,000 rows (NVIDIA/CUDALibrarySamples#246), and
with its 32-bit interface from 26,732 rows in float64 (jax#23413). LAPACK's syevd stores its
workspace size, 1 + 6 n + 2 n^2 values, in 32 bits, which suffices up to 32,766.
"""
PROBES = 4
"""Number of random vectors with which a decomposition is checked."""
ALLOWED = 10
"""Largest error that passes the check, in units of n eps.

Measured on a CPU, float64 and float32, for n = 2, 64, 576, 1536: 0.5, 0.1, 0.02, 0.01."""

_Found = TypeVar("_Found", bound=tuple[Tensor, ...])
Attempt = tuple[torch.device, torch.dtype]


class Eigensolver:
    """Solver for the symmetric eigendecompositions of one computation; records the fallbacks used.

    The first solver runs on the matrix's device in the matrix's dtype. If it does not converge,
    fails, or returns a result that fails the check, float64 on the same device is tried, then
    float64 on the CPU; devices for which the matrix is too large (`LARGEST`) are skipped. Results
    always have the matrix's dtype and device. On a CPU they are bit-identical to
    `torch.linalg.eigh` and `eigvalsh` of the matrix, unless these fail. On CUDA, PyTorch uses
    divide and conquer (syevd), except for 32 to 512 rows of float32, where it uses the slower
    Jacobi rotations (syevj); this affects the first steps of a robust PCA of a small model.

    The check of A = V diag(w) V^T uses random vectors P [N, 4] and requires, with c = `ALLOWED`,

        |V diag(w) V^T P - A P|_F <= c n eps |w|_max |P|_F,   |V V^T P - P|_F <= c n eps |P|_F

    and, for eigenvalues alone, | |w|^2 - |A|_F^2 | <= c n eps |A|_F^2. It costs 40 n^2 FLOPs in
    addition to 9 n^3; on one CPU thread 8 % of the time for n = 576 and 3 % for n = 1536. Out of
    memory and other device errors are not solver failures and are raised unchanged.
    """

    def __init__(self) -> None:
        self._elsewhere: dict[str, None] = {}

    @property
    def report(self) -> dict[str, str]:
        """`eigen`: the fallback solvers used, such as `cpu float64`; empty if none."""
        return {"eigen": ", ".join(self._elsewhere)} if self._elsewhere else {}

    def decompose(self, matrix_NN: Tensor, *, upper: bool = False) -> tuple[Tensor, Tensor]:
        """Compute eigenvalues [N], ascending, and eigenvectors, the columns of [N, N].

        Args:
            upper: Read the upper triangle instead of the lower one.

        Raises:
            InputError: The triangle contains NaN or infinity, the matrix is too large for every
                solver, or no result passes the check.
        """
        tries = attempts(len(matrix_NN), matrix_NN.device, matrix_NN.dtype)
        probe_NP, image_NP = _probe(matrix_NN, upper)

        def solve(given_NN: Tensor) -> tuple[Tensor, Tensor]:
            values_N, vectors_NN = torch.linalg.eigh(given_NN, UPLO="U" if upper else "L")
            return values_N, vectors_NN

        def passes(found: tuple[Tensor, Tensor]) -> bool:
            return _rebuilds(*found, probe_NP, image_NP)

        return self._first(tries, matrix_NN, solve, passes)

    def values(self, matrix_NN: Tensor, *, upper: bool = False) -> Tensor:
        """Compute the eigenvalues [N] alone, ascending; arguments and errors as in `decompose`."""
        tries = attempts(len(matrix_NN), matrix_NN.device, matrix_NN.dtype)
        half_NN = _triangle(matrix_NN, upper).double()
        energy = float(2 * half_NN.square().sum() - half_NN.diagonal().square().sum())
        del half_NN

        def solve(given_NN: Tensor) -> tuple[Tensor]:
            return (torch.linalg.eigvalsh(given_NN, UPLO="U" if upper else "L"),)

        def passes(found: tuple[Tensor]) -> bool:
            gap = abs(float(found[0].double().square().sum()) - energy)
            return gap <= _bound(matrix_NN) * energy

        return self._first(tries, matrix_NN, solve, passes)[0]

    def _first(
        self,
        tries: list[Attempt],
        matrix_NN: Tensor,
        solve: Callable[[Tensor], _Found],
        passes: Callable[[_Found], bool],
    ) -> _Found:
        """Return the result of the first solver that passes the check."""
        failures = []
        for device, dtype in tries:
            name = f"{device.type} {str(dtype).removeprefix('torch.')}"
            try:
                found = solve(matrix_NN.to(device, dtype))
            except RuntimeError as error:
                if not _is_of_solver(error):
                    raise
                failures.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            back: _Found = type(found)(each.to(matrix_NN) for each in found)
            if passes(back):
                if (device, dtype) != (matrix_NN.device, matrix_NN.dtype):
                    self._elsewhere[name] = None
                return back
            failures.append(f"{name}: the result fails the check")
        n = len(matrix_NN)
        raise InputError(
            f"no eigendecomposition of a [{n}, {n}] matrix was found ({'; '.join(failures)}); "
            "leave its linear out of the targets, or calibrate again"
        )


def attempts(size: int, device: torch.device, dtype: torch.dtype) -> list[Attempt]:
    """Return the solvers to try, in order, for a matrix with this number of rows.

    Raises:
        InputError: The matrix is too large for all of them.
    """
    wide, cpu = torch.float64, torch.device("cpu")
    tries = dict.fromkeys([(device, dtype), (device, wide), (cpu, wide)])
    found = [each for each in tries if size <= LARGEST.get(each[0].type, LARGEST["cpu"])]
    if not found:
        raise InputError(
            f"a [{size}, {size}] matrix is too large for an eigendecomposition: cuSOLVER takes "
            f"{LARGEST['cuda']} rows, LAPACK {LARGEST['cpu']}; leave its linear out of the targets"
        )
    return found


def _is_of_solver(error: RuntimeError) -> bool:
    """Tell solver failures from errors of memory or device.

    PyTorch raises LinAlgError if an algorithm does not converge or cuSOLVER reports a wrong
    argument; for other errors of cuSOLVER its message names the routine.
    """
    text = str(error)
    is_named = "cusolver error" in text and "syev" in text and "ALLOC_FAILED" not in text
    return isinstance(error, LinAlgError) or is_named


def _triangle(matrix_NN: Tensor, upper: bool) -> Tensor:
    """Return the triangle that is read, with zeros in the other one.

    Raises:
        InputError: It contains NaN or infinity.
    """
    half_NN = matrix_NN.triu() if upper else matrix_NN.tril()
    check_finite("matrix to decompose", half_NN)
    return half_NN


def _probe(matrix_NN: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    """Return random P [N, P] and A P, computed before the decomposition, while memory is free."""
    half_NN = _triangle(matrix_NN, upper)
    generator = torch.Generator().manual_seed(0)
    random_NP = torch.randn(len(matrix_NN), PROBES, generator=generator, dtype=torch.float64)
    probe_NP = random_NP.to(matrix_NN)
    image_NP = half_NN @ probe_NP
    image_NP += half_NN.T @ probe_NP
    image_NP -= half_NN.diagonal()[:, None] * probe_NP
    return probe_NP, image_NP


def _rebuilds(values_N: Tensor, vectors_NN: Tensor, probe_NP: Tensor, image_NP: Tensor) -> bool:
    """Return True if the vectors are orthonormal and reproduce the matrix; False for NaN."""
    turned_NP = vectors_NN.T @ probe_NP
    both_N2P = vectors_NN @ torch.cat([turned_NP, values_N[:, None] * turned_NP], dim=1)
    turn_NP, rebuilt_NP = both_N2P.tensor_split(2, dim=1)
    size, largest = probe_NP.norm(), values_N.abs().max()
    gaps = torch.stack([(turn_NP - probe_NP).norm(), (rebuilt_NP - image_NP).norm()])
    scales = torch.stack([size, size * largest])
    # subnormal results have no relative precision
    least = len(vectors_NN) * torch.finfo(vectors_NN.dtype).tiny
    return bool((gaps <= _bound(vectors_NN) * scales + least).all())


def _bound(matrix_NN: Tensor) -> float:
    """Return the largest relative error that passes the check."""
    return ALLOWED * len(matrix_NN) * torch.finfo(matrix_NN.dtype).eps
