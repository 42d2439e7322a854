"""Symmetric eigendecompositions: checked, and computed elsewhere where a device's solver fails.

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
"""Rows up to which a device's solver is called.

cuSOLVER's query of its workspace fails from somewhere above 25,000 rows on
(NVIDIA/CUDALibrarySamples#246), with its 32-bit interface from 26,732 in float64 (jax#23413).
LAPACK's syevd counts a workspace of 1 + 6 n + 2 n^2 values in 32 bits, which holds up to 32,766.
"""
PROBES = 4
"""Random vectors that a decomposition is checked with."""
ALLOWED = 10
"""Largest error that passes the check, in units of n eps.

Measured on a CPU, float64 and float32, for n = 2, 64, 576, 1536: 0.5, 0.1, 0.02, 0.01."""

_Found = TypeVar("_Found", bound=tuple[Tensor, ...])
Attempt = tuple[torch.device, torch.dtype]


class Eigensolver:
    """The symmetric eigendecompositions of one computation, and a note of those made elsewhere.

    The first solver is that of the matrix's device in the matrix's dtype. Where it does not
    converge, fails, or gives a result that does not pass the check, the device's float64 is next,
    then the CPU's; devices on which the matrix is too large (`LARGEST`) are left out. Results have
    the matrix's dtype and device whichever solver they come from. On a CPU they are, to the bit,
    those of `torch.linalg.eigh` and `eigvalsh` on the matrix, unless these fail. On CUDA PyTorch
    takes divide and conquer (syevd), but Jacobi rotations (syevj), which are slower, for 32 to 512
    rows of float32: those of the first steps of a robust PCA of a small model.

    The check of A = V diag(w) V^T takes random vectors P [N, 4] and asks, with c = `ALLOWED`,

        |V diag(w) V^T P - A P|_F <= c n eps |w|_max |P|_F,   |V V^T P - P|_F <= c n eps |P|_F

    and of eigenvalues alone | |w|^2 - |A|_F^2 | <= c n eps |A|_F^2. It takes 40 n^2 FLOPs beside
    9 n^3; on one CPU thread 8 % of the time for n = 576 and 3 % for n = 1536. Out of
    memory and other errors of a device are no failures of a solver, and are raised unchanged.
    """

    def __init__(self) -> None:
        self._elsewhere: dict[str, None] = {}

    @property
    def report(self) -> dict[str, str]:
        """`eigen`: the solvers that stood in for the first one, `cpu float64`; empty if none."""
        return {"eigen": ", ".join(self._elsewhere)} if self._elsewhere else {}

    def decompose(self, matrix_NN: Tensor, *, upper: bool = False) -> tuple[Tensor, Tensor]:
        """Eigenvalues [N], ascending, and eigenvectors [N, N], the columns.

        Args:
            upper: Whether the upper triangle is read, and not the lower one.

        Raises:
            InputError: The triangle holds NaN or infinity, the matrix is too large for every
                solver, or no result passes the check.
        """
        tries = attempts(len(matrix_NN), matrix_NN.device, matrix_NN.dtype)
        probe_NP, image_NP = _probe(matrix_NN, upper)

        def solve(given_NN: Tensor) -> tuple[Tensor, Tensor]:
            values_N, vectors_NN = torch.linalg.eigh(given_NN, UPLO="U" if upper else "L")
            return values_N, vectors_NN

        def holds(found: tuple[Tensor, Tensor]) -> bool:
            return _rebuilds(*found, probe_NP, image_NP)

        return self._first(tries, matrix_NN, solve, holds)

    def values(self, matrix_NN: Tensor, *, upper: bool = False) -> Tensor:
        """Eigenvalues alone [N], ascending; arguments and errors as in `decompose`."""
        tries = attempts(len(matrix_NN), matrix_NN.device, matrix_NN.dtype)
        half_NN = _triangle(matrix_NN, upper).double()
        energy = float(2 * half_NN.square().sum() - half_NN.diagonal().square().sum())
        del half_NN

        def solve(given_NN: Tensor) -> tuple[Tensor]:
            return (torch.linalg.eigvalsh(given_NN, UPLO="U" if upper else "L"),)

        def holds(found: tuple[Tensor]) -> bool:
            gap = abs(float(found[0].double().square().sum()) - energy)
            return gap <= _bound(matrix_NN) * energy

        return self._first(tries, matrix_NN, solve, holds)[0]

    def _first(
        self,
        tries: list[Attempt],
        matrix_NN: Tensor,
        solve: Callable[[Tensor], _Found],
        holds: Callable[[_Found], bool],
    ) -> _Found:
        """Result of the first solver that passes the check."""
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
            if holds(back):
                if (device, dtype) != (matrix_NN.device, matrix_NN.dtype):
                    self._elsewhere[name] = None
                return back
            failures.append(f"{name}: the result is no decomposition of the matrix")
        n = len(matrix_NN)
        raise InputError(
            f"no eigendecomposition of a [{n}, {n}] matrix was found ({'; '.join(failures)}); "
            "leave its linear out of the targets, or calibrate again"
        )


def attempts(size: int, device: torch.device, dtype: torch.dtype) -> list[Attempt]:
    """Solvers to try, in order, for a matrix with this number of rows.

    Raises:
        InputError: It is too large for all of them.
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
    """True if a solver failed, and not the memory or the device that it uses.

    PyTorch raises LinAlgError where an algorithm did not converge or cuSOLVER calls an argument
    wrong, and names the routine in what else cuSOLVER returns.
    """
    text = str(error)
    is_named = "cusolver error" in text and "syev" in text and "ALLOC_FAILED" not in text
    return isinstance(error, LinAlgError) or is_named


def _triangle(matrix_NN: Tensor, upper: bool) -> Tensor:
    """The triangle that is read, with zeros in the other one.

    Raises:
        InputError: It holds NaN or infinity.
    """
    half_NN = matrix_NN.triu() if upper else matrix_NN.tril()
    check_finite("matrix to decompose", half_NN)
    return half_NN


def _probe(matrix_NN: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    """Random P [N, P] and A P, computed first, while memory is free."""
    half_NN = _triangle(matrix_NN, upper)
    generator = torch.Generator().manual_seed(0)
    random_NP = torch.randn(len(matrix_NN), PROBES, generator=generator, dtype=torch.float64)
    probe_NP = random_NP.to(matrix_NN)
    image_NP = half_NN @ probe_NP
    image_NP += half_NN.T @ probe_NP
    image_NP -= half_NN.diagonal()[:, None] * probe_NP
    return probe_NP, image_NP


def _rebuilds(values_N: Tensor, vectors_NN: Tensor, probe_NP: Tensor, image_NP: Tensor) -> bool:
    """True if the vectors are orthonormal and give the matrix again; false for NaN."""
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
    """Largest relative error that passes the check."""
    return ALLOWED * len(matrix_NN) * torch.finfo(matrix_NN.dtype).eps
