"""Second moment of the inputs or outputs of a linear, accumulated chunk by chunk.

Shape suffixes: T tokens (or any summed dimension), I channels.
"""

from typing import Self

import torch
from torch import Tensor

from orchestrator.errors import InputError
from orchestrator.linalg.tensor_cores import tensor_cores

FLUSH_TOKENS = 8192
"""Number of tokens whose products are summed in float32 before they are added to the float64 sum.
"""


class Gram:
    """Running second moment `H = sum x x^T` over rows x.

    A monoid: `Gram(n)` is the unit, `update` adds rows, `merge` adds another Gram. In exact
    arithmetic the order does not matter; in floating point the bits depend only on the sequence of
    updates and merges, not on the process or on when `matrix` is read. Callers therefore update
    with chunks of fixed size and merge in a fixed order.

    Products are float32 whatever dtype the rows have, summed over at most `FLUSH_TOKENS` tokens and
    then added to a float64 sum, so the error, 1e-7 to 5e-6 of H depending on the summation order of
    the BLAS, does not grow with the number of tokens. On a GPU products of 16-bit rows use the
    tensor cores (`tensor_cores`). The sums are on the given device, as the rows must be. Costs
    about 1.2 n^2 FLOPs a token, since only bands from the diagonal on are computed; holds 12 n^2
    bytes, and 8 n^2 after `flush_writes`.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu"):
        self.n = n
        self.tokens = 0
        """Number of rows added so far."""
        self._sum_II = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._recent_II = torch.zeros(n, n, dtype=torch.float32, device=device)
        self._recent_tokens = 0
        self._is_settled = False

    @classmethod
    def of(cls, matrix_II: Tensor, tokens: int) -> Self:
        """Return the Gram whose `matrix` and number of rows these are; it takes no more rows."""
        gram = cls(0)
        gram.n, gram.tokens, gram._sum_II = len(matrix_II), tokens, matrix_II
        gram._recent_II = matrix_II.new_zeros((), dtype=torch.float32)
        gram._is_settled = True
        return gram

    def update(self, rows_TI: Tensor) -> Self:
        """Add the rows selected by the token mask, in any floating dtype.

        Raises:
            ValueError: The rows have another number of channels, or the float32 sum was freed.
        """
        if self._is_settled:
            raise ValueError(f"the Gram of {self.tokens} tokens is settled: it takes no more rows")
        if rows_TI.ndim != 2 or rows_TI.shape[1] != self.n:
            raise ValueError(f"rows have shape {tuple(rows_TI.shape)}, not [tokens, {self.n}]")
        for start in range(0, len(rows_TI), FLUSH_TOKENS):
            piece_TI = rows_TI[start : start + FLUSH_TOKENS].to(torch.float32).contiguous()
            if self._recent_tokens + len(piece_TI) > FLUSH_TOKENS:
                self._flush()
            with tensor_cores(rows_TI.dtype):
                add_upper_product(self._recent_II, piece_TI, piece_TI)
            self._recent_tokens += len(piece_TI)
        self.tokens += len(rows_TI)
        return self

    def merge(self, other: Self) -> Self:
        """Add the sums of another Gram, which is not changed."""
        if other.n != self.n:
            raise ValueError(f"a Gram of {other.n} channels cannot join one of {self.n}")
        self._flush()
        self._sum_II += other._sum_II + other._recent_II
        self.tokens += other.tokens
        return self

    def matrix(self) -> Tensor:
        """Return H, float64 and exactly symmetric; needs 8 n^2 temporary bytes in addition to the
        result.

        Raises:
            InputError: H contains NaN or infinity; the message gives the number of entries.
        """
        matrix_II = (self._sum_II + self._recent_II).triu_()
        matrix_II += matrix_II.triu(1).T
        check_finite(f"Gram matrix of {self.tokens} tokens", matrix_II)
        return matrix_II

    def flush_writes(self) -> None:
        """Free the float32 sum, 4 n^2 bytes, after the last row; H is unchanged to the bit."""
        self._flush()
        self._recent_II = self._recent_II.new_zeros(())
        self._is_settled = True

    def _flush(self) -> None:
        self._sum_II += self._recent_II
        self._recent_II.zero_()
        self._recent_tokens = 0


def add_upper_product(sum_II: Tensor, left_TI: Tensor, right_TI: Tensor) -> None:
    """Add `left^T right`, a symmetric product, to the upper triangle of a sum, in place.

    Computed in bands of rows, each from its first diagonal entry on, for 0.6 of the FLOPs of the
    full product. Entries below the diagonal are undefined afterwards.
    """
    n = len(sum_II)
    # Measured with AVX-512, relative to the time of the full product: bands of 96 rows take 0.64
    # for n = 576 and 0.78 for n = 192; bands of n / 8 rows take 0.67 for n = 1536. On a GPU a large
    # n needs large bands.
    rows = max(96, n // 8)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        sum_II[start:stop, start:].addmm_(left_TI[:, start:stop].T, right_TI[:, start:])


def check_finite(name: str, matrix: Tensor) -> None:
    """Raise `InputError` with the number of NaN or infinite entries of a matrix, if any."""
    if matrix.sum().isfinite():  # one cheap pass; a finite sum has finite terms
        return
    bad = matrix.numel() - int(matrix.isfinite().sum())
    if bad:
        raise InputError(
            f"{name} has {bad} non-finite of {matrix.numel()} entries; "
            "check the checkpoint, the calibration text and the forward dtype"
        )
