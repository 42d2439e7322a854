"""Rates of this machine, and the least time that they allow for a product.

A product of T tokens with V stored values takes 2 T V operations and reads V values, T inputs and
writes T outputs; it takes at least the longer of both times.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from orchestrator.device.timing import in_turn

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices whose product is measured, by device."""
READ_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Bytes of the matrix that is read once in a measurement; larger than caches."""
READ_COLUMNS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """MeasuredLinear rates of one device in one dtype, with the threads of this process."""

    flops: float
    """Operations a second of a large matrix product; a multiply-add counts as two."""
    bandwidth: float
    """Bytes a second of a matrix-vector product, which reads its matrix once."""
    itemsize: int
    """Bytes of a value."""

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device) -> "Roofline":
        """Measure both rates by the clock of all other times, in turn."""
        size = PRODUCT_SIZE.get(device.type, PRODUCT_SIZE["cpu"])
        read = READ_BYTES.get(device.type, READ_BYTES["cpu"])
        square = torch.ones(size, size, dtype=dtype, device=device)
        rows = read // dtype.itemsize // READ_COLUMNS
        tall = torch.ones(rows, READ_COLUMNS, dtype=dtype, device=device)
        vector = torch.ones(READ_COLUMNS, dtype=dtype, device=device)
        with torch.inference_mode():
            runs = {"product": lambda: square @ square, "read": lambda: tall @ vector}
            times = in_turn(runs, device)
        return cls(
            flops=2.0 * size**3 / times["product"].median,
            bandwidth=tall.numel() * dtype.itemsize / times["read"].median,
            itemsize=dtype.itemsize,
        )

    def seconds(self, tokens: int, values: float, moved: float = 0.0) -> float:
        """Return the least seconds of products with `values` stored values.

        Args:
            moved: Values that are read or written beside them.
        """
        computed = 2.0 * tokens * values / self.flops
        return max(computed, (values + moved) * self.itemsize / self.bandwidth)

    def copied(self, values: float) -> float:
        """Return the seconds in which values are read and written once."""
        return 2 * values * self.itemsize / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
