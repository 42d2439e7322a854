"""Codes of the positions of a sparse weight's values: sizes, and the choice of the smallest.

Their tensors are in `orchestrator.models.forms.index_codes`.
"""

from typing import Literal

IndexCode = Literal["bitmask", "columns", "positions"]


def index_bytes(out_features: int, in_features: int, nonzeros: int) -> dict[IndexCode, int]:
    """Bytes of the index of N values in an [O, I] weight, for every code that can hold it.

    `bitmask`: one bit an element, ceil(O I / 8). `columns`: column numbers of 16 bits and O + 1 row
    pointers of 32, 2 N + 4 (O + 1); up to 65536 columns. `positions`: flat, of 32 bits, 4 N; up to
    2^31 elements.
    """
    elements = out_features * in_features
    sizes: dict[IndexCode, int] = {"bitmask": (elements + 7) // 8}
    if in_features <= 2**16 and nonzeros < 2**31:
        sizes["columns"] = 2 * nonzeros + 4 * (out_features + 1)
    if elements <= 2**31:
        sizes["positions"] = 4 * nonzeros
    return sizes


def index_code(out_features: int, in_features: int, nonzeros: int) -> IndexCode:
    """Smallest code; of equal ones the first in the order bitmask, columns, positions."""
    sizes = index_bytes(out_features, in_features, nonzeros)
    return min(sizes, key=lambda code: sizes[code])


def smallest_index(out_features: int, in_features: int, nonzeros: int) -> int:
    """Bytes of the smallest index of N values in an [O, I] weight; 0 if N is 0."""
    return min(index_bytes(out_features, in_features, nonzeros).values()) if nonzeros else 0
