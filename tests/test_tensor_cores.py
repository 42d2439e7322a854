"""When float32 products may go through tensor cores: where TF32 holds every value."""

import pytest
import torch

from orchestrator.linalg.tensor_cores import is_exact, tensor_cores

DROPPED_BITS = 13
"""Of float32's 23 behind the binary point, those that TF32 lacks."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_holds_every_value_of_16_bits(dtype):
    """Every one of the 65,536, subnormals included, is zero where TF32 has no bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = every.float().view(torch.int32)
    assert len(bits.unique()) > 0.98 * 2**16  # some NaNs become one
    assert torch.all(bits % 2**DROPPED_BITS == 0)
    assert is_exact(dtype)
    assert is_exact(dtype, torch.bfloat16)


def test_it_does_not_hold_those_of_float32():
    """One and the next float32 are the same to TF32, so such products stay off tensor cores."""
    bits = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).view(torch.int32)
    assert bits % 2**DROPPED_BITS != 0
    assert not is_exact(torch.float32)
    assert not is_exact(torch.bfloat16, torch.float32)


@pytest.fixture
def products():
    """CUDA's products, as they were behind the test."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    yield products
    products.fp32_precision = before


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_setting_is_that_of_the_products_alone(before, products):
    """On for exact products, off for others, and as it was behind both, errors included."""
    products.fp32_precision = before
    with tensor_cores(torch.bfloat16, torch.float16):
        assert products.fp32_precision == "tf32"
    assert products.fp32_precision == before
    with tensor_cores(torch.bfloat16, torch.float32):
        assert products.fp32_precision == "ieee"
    with pytest.raises(RuntimeError), tensor_cores(torch.bfloat16):
        raise RuntimeError("out of memory")
    assert products.fp32_precision == before
