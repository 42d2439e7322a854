"""Float32 products on a GPU's tensor cores, where that rounds nothing.

TF32 keeps 10 bits behind the binary point and float32's exponents. Every value of bfloat16 (7 bits)
and of float16 (10) is one of TF32's, and a product of two of them has at most 22 bits, so it is
exact in float32 as it is without tensor cores. What is left is rounding of the sum, which tensor
cores do in their own way: its error was not measured on a GPU yet. An H100 computes so at 7 times
the rate of its float32, an A100 at 8.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_EXACT = (torch.bfloat16, torch.float16)


def is_exact(*dtypes: torch.dtype) -> bool:
    """Whether TF32 holds every value of these dtypes."""
    return all(dtype in _EXACT for dtype in dtypes)


@contextmanager
def tensor_cores(*dtypes: torch.dtype) -> Iterator[None]:
    """Has CUDA use TF32 for float32 products if what both sides were cast from is exact in it.

    If not, float32 itself, whatever the environment says of TF32. On a CPU this changes nothing.
    Not for two threads at a time: the setting is the process's.

    Nothing but products belongs inside. While TF32 is on by this setting, PyTorch raises
    RuntimeError when the older settings are read, `torch.backends.cuda.matmul.allow_tf32` or
    `torch.get_float32_matmul_precision()`, as compilers and other libraries do.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if is_exact(*dtypes) else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
